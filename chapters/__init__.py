"""What belongs to the course, and is run by python -m chapters.NAME from the folder above.

Which leaf belongs to what (.ipynb are the chapters; a leaf may import those of other rows):

    the course           checks figures
    files of any kind    sources formats pages warc wikitext
    filters of text      curate choices stages engine cleaning measures rules ngrams classify
                         privacy near
    corpora              datacard mix balance curriculum grammar synthetic chats
    other formats        export weights token_files peft_files gguf_files onnx_files
    speed                kernels cuda_kernels
    before a run         plan cost memory settings search sweep
    during and after it  doctor nonfinite track compare
    many processes       processes parallel pipeline scale gather
    writing              beam talk client
    exams                exams prompts probes box card
    judges and people    judge questions dialogue rate voting
    fine-tuning          tasks clauses merge
    alignment            align answers rewards
    cheaper tokens       quantize speculative batching paging
    serving              serve gate protocol replies grpc_serve operate watch drift feedback rollout
    safety               safety fairness refusals guard memorization membership dpsgd backdoor
    other architectures  experts longrange latent context
    beyond the model     trials retrieval facts distill solve reasoning tools pictures
"""

import signal
import sys

# While Python looks for the module of -m, this is its name: a command is being started.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
