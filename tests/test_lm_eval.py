"""lm-evaluation-harness asks chapters/serve.py with its local-completions model, and finds what
evaluate.py finds without a server."""

import json
from contextlib import closing

import pytest
from conftest import tiny

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm_eval[api]'")
pytest.importorskip("tenacity", reason="pip install 'lm_eval[api]'")

from chapters.replies import Watch
from chapters.serve import Served
from data import read_documents
from evaluate import continuation_rows, loglikelihood, multiple_choice
from asking import serve

KEY = "a-key-of-sixteen-characters"
TASK = """
task: here
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def rows(shards):
    """Questions whose right choice is how a sentence goes on."""
    texts = [*read_documents(shards.parent / "words.txt")]
    sentences = [line for text in texts for line in text.splitlines()]
    rows = continuation_rows(["\n".join(sentences[i:i + 6]) for i in range(0, 600, 6)], 20)
    rows = [row | dict(context=row["context"][-150:].lstrip(),
                       choices=[choice.strip() for choice in row["choices"]]) for row in rows]
    return [rows[0] | dict(context=""), *rows]  # a document begins


@pytest.mark.slow
def test_the_harness_finds_the_scores_of_evaluate(rows, tokenizer, tmp_path, monkeypatch):
    for name, value in dict(HF_HUB_OFFLINE="1", OPENAI_API_KEY=KEY).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "here.yaml").write_text(TASK.format(path=tmp_path / "rows.jsonl"))
    model = tiny(vocab_size=tokenizer.n_vocab, block_size=128, seed=3)
    expected = multiple_choice(model, tokenizer, [row | dict(between=" ") for row in rows])
    with closing(Served(tmp_path / "run", model, tokenizer, 8)) as served, serve(
            {"run": served}, Watch(), key=KEY) as url:
        found = lm_eval.simple_evaluate(
            model="local-completions", tasks=["here"], bootstrap_iters=0, model_args=dict(
                base_url=f"{url}/v1/completions", model="run", num_concurrent=4, max_length=128,
                auth_token=KEY),
            task_manager=lm_eval.tasks.TaskManager(
                include_path=str(tmp_path), include_defaults=False))
    scores = found["results"]["here"]
    assert scores["acc,none"] == pytest.approx(expected["acc"])
    assert scores["acc_norm,none"] == pytest.approx(expected["acc_norm"])
    for sample in found["samples"]["here"]:
        row = rows[sample["doc_id"]]
        pairs = [(row["context"], " " + choice) for choice in row["choices"]]
        for (score, greedy), (own, is_likeliest) in zip(
                sample["filtered_resps"], loglikelihood(model, tokenizer, pairs)):
            assert score == pytest.approx(own, abs=1e-4) and greedy == is_likeliest
