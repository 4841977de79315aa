"""Chapter 15's Dockerfile, manifest and proxy: the steps of the Dockerfile are taken in a clean
environment and what they make serves; the others agree with it and with the server."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time

import pytest
from conftest import ROOT, keep, tiny

from asking import ask

KEY = "a-key-of-sixteen-characters"


def block(language):
    """The text of the one block in this language in chapter 15."""
    cells = json.loads((ROOT / "chapters/15_serving.ipynb").read_text("utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found, = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)
    return found


def instructions():
    """[(instruction, its words)] of the Dockerfile."""
    lines = block("dockerfile").replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines]


@pytest.fixture(scope="module")
def manifest():
    """{kind: dict} of the Kubernetes manifest."""
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    return {part["kind"]: part for part in yaml.safe_load_all(block("yaml"))}


@pytest.fixture(scope="module")
def container(manifest):
    found, = manifest["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


# -----------------------------------------------------------------------------
# The Dockerfile.


def clean_environment(folder):
    """A new virtual environment without a library, which finds those of this one when it looks for
    what is installed already -> the variables to use it with."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    own = subprocess.run([folder / "bin/python", "-c", "import sysconfig as s; "
                          "print(s.get_path('purelib'))"], capture_output=True, text=True,
                         check=True).stdout.strip()
    with open(f"{own}/installed.pth", "w") as file:
        file.write(sysconfig.get_path("purelib"))
    return dict(PATH=f"{folder}/bin:{os.environ['PATH']}", HOME=str(folder), PIP_NO_INDEX="1",
                OMP_NUM_THREADS="1", SERVE_KEY=KEY)


def build(folder, variables):
    """Take the Dockerfile's steps in a folder -> the words of CMD and of HEALTHCHECK's CMD."""
    commands = {}
    for name, words in instructions():
        if name == "COPY":
            *sources, target = words.split()
            for source in map(ROOT.joinpath, sources):
                copy = shutil.copytree if source.is_dir() else shutil.copy
                copy(source, folder / target)
        elif name == "RUN":
            done = subprocess.run(["sh", "-c", words], cwd=folder, env=variables,
                                  capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        elif name == "ENV":
            variables |= dict(pair.split("=", 1) for pair in shlex.split(words))
        elif "CMD" in (name, *words.split()):
            commands[name] = json.loads(words[words.index("["):])
    return commands["CMD"], commands["HEALTHCHECK"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the Dockerfile is for Linux")
def test_the_steps_of_the_dockerfile_make_a_server_that_is_healthy_and_stops(tokenizer, tmp_path):
    run, app = tmp_path / "runs/chat", tmp_path / "app"
    keep(tiny(vocab_size=tokenizer.n_vocab, block_size=64), run)
    tokenizer.save(run / "tokenizer.json")
    app.mkdir()
    variables = clean_environment(tmp_path / "venv")
    command, check = build(app, variables)
    names = [line.split("==")[0] for line in (app / "serving.txt").read_text().split()]
    assert {"torch", "numpy", "fastapi", "uvicorn", "prometheus_client", "regex"} <= {*names}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command, check = ([word.replace("8000", port).replace("/runs/chat", str(run)).replace(
        "0.0.0.0", "127.0.0.1") for word in words] for words in (command, check))
    server = subprocess.Popen(command, cwd=app, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        line = server.stderr.readline()
        assert f":{port}/" in line, line + server.stderr.read()
        for _ in range(50):
            healthy = subprocess.run(check, cwd=app, env=variables, capture_output=True)
            if healthy.returncode == 0:
                break
            time.sleep(0.2)
        assert healthy.returncode == 0, healthy.stderr
        status, reply = ask(f"http://127.0.0.1:{port}/v1/completions",
                            dict(prompt="the cat", max_tokens=5, seed=1), KEY)
        assert status == 200 and reply["usage"]["completion_tokens"] == 5
        assert ask(f"http://127.0.0.1:{port}/v1/completions", dict(prompt="x"))[0] == 401
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()
    assert subprocess.run(check, cwd=app, env=variables, capture_output=True).returncode != 0


def test_the_image_has_the_needed_files_and_no_more_and_is_not_root():
    found = {}
    for name, words in instructions():
        found.setdefault(name, []).append(words)
    copied = [source for words in found["COPY"] for source in words.split()[:-1]]
    assert copied == ["requirements.txt", "tokenizer.py", "data.py", "model.py", "sample.py",
                      "train.py", "evaluate.py", "chapters"]
    (user,), (image,) = found["USER"], found["FROM"]
    assert int(user.split(":")[0]) > 0 and image.endswith("-slim")
    assert [*found][-1] == "CMD" and found["STOPSIGNAL"] == ["SIGTERM"]


# -----------------------------------------------------------------------------
# The manifest and the proxy.


def test_the_manifest_starts_what_the_dockerfile_starts_and_asks_where_the_server_answers(
        manifest, container):
    command = json.loads(dict(instructions())["CMD"])
    assert container["args"][:len(command)] == command
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    (port,) = container["ports"]
    assert probes == [dict(path="/health", port=port["containerPort"])] * 3
    service = manifest["Service"]["spec"]
    assert service["ports"][0]["targetPort"] == port["containerPort"] == 8000
    pod = manifest["Deployment"]["spec"]["template"]
    assert pod["metadata"]["labels"].items() >= service["selector"].items()
    assert manifest["Deployment"]["spec"]["selector"]["matchLabels"] == service["selector"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]}


def test_a_replica_that_stops_has_the_time_that_its_streams_may_take(manifest, container):
    spec = manifest["Deployment"]["spec"]
    pause, = [int(word) for word in container["lifecycle"]["preStop"]["exec"]["command"][1:]]
    timeout, = [float(word.split("=")[1]) for word in container["args"] if "--timeout=" in word]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > pause + timeout
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    scaler = manifest["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == manifest["Deployment"]["metadata"]["name"]
    assert scaler["minReplicas"] == spec["replicas"]


def test_the_options_of_the_manifest_are_the_servers_and_its_key_is_a_secret(container):
    pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
    from chapters.serve import ServeConfig
    options = dict(word[2:].split("=") for word in container["args"] if word.startswith("--"))
    kinds = {"port": int, "timeout": float}
    config = ServeConfig(key=KEY, **{name: kinds.get(name, str)(value)
                                     for name, value in options.items()})
    assert not config.is_local()
    key, = [item for item in container["env"] if item["name"] == "SERVE_KEY"]
    assert [*key["valueFrom"]] == ["secretKeyRef"] and "value" not in key


def test_the_proxy_does_not_hold_tokens_back_and_waits_longer_than_the_server():
    pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
    from chapters.serve import ServeConfig
    lines = [line.partition("#")[0].strip().rstrip(";") for line in block("nginx").splitlines()]
    options = dict(line.split(None, 1) for line in lines if " " in line)
    assert options["proxy_buffering"] == "off"
    assert float(options["proxy_read_timeout"].removesuffix("s")) > ServeConfig().timeout
    assert "proxy_set_header Host localhost" in lines  # what the servers take for their own
    assert block("nginx").count("{") == block("nginx").count("}")
