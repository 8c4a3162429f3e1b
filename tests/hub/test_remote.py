"""Models, encoders and adapters by name, from a hub on loopback: what is fetched, what is kept, and
one line for what cannot be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kafjax import hub, lora
from kafjax.core.errors import UserError
from kafjax.hub import remote
from tests import compiling, tiny
from tests.hub import loopback

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).parents[2]
LOAD = """
import sys
from kafjax import hub
from kafjax.core.errors import UserError
for name in sys.argv[1:]:
    try:
        model, params = hub.load(name)
        hub.tokenizer(name)
        print(type(model).__name__, float(sum(abs(leaf).sum() for leaf in __import__("jax").tree.leaves(params))))
    except UserError as error:
        print("refused:", error)
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folders of a hub: what is published beside what is read, too."""
    root = tmp_path_factory.mktemp("hub")
    gemma = tiny.write_gemma(root / "org" / "gemma")
    for name in (
        "pytorch_model.bin",
        "README.md",
        "modeling_own.py",
        "consolidated.safetensors",
        "onnx/model.safetensors",
    ):
        (gemma / name).parent.mkdir(exist_ok=True)
        (gemma / name).write_bytes(b"never read")
    tiny.write_bert(root / "org" / "bert")
    tiny.write_qwen(root / "private" / "qwen")
    other = tiny.write_qwen(root / "org" / "other")
    (other / "config.json").write_text('{"model_type": "mamba"}')
    model, params = hub.load(str(gemma))
    spec = lora.Spec(rank=2)
    hub.save_peft(
        root / "org" / "adapter",
        lora.init(spec, params, __import__("jax").random.key(0)),
        spec,
        model,
        params,
    )
    return root


@pytest.fixture
def at(published):
    with loopback.serving(published) as served:
        yield served


def load(home, endpoint, *names, cwd=ROOT, script=LOAD, **environment):
    """Loads each name in a process of its own, since huggingface_hub reads its settings once."""
    settings = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    env = compiling.environment(**settings)
    env.pop("HF_TOKEN", None) if "HF_TOKEN" not in environment else None
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, names)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_name_is_fetched_once_and_then_found_without_a_network(at, published, tmp_path):
    at.breaks.add("model.safetensors")
    expected = load(
        tmp_path / "a",
        "http://127.0.0.1:9",
        published / "org" / "gemma",
        published / "org" / "bert",
    )
    assert load(tmp_path, at.endpoint, "org/gemma", "org/bert") == expected
    fetched = at.fetched()
    assert {"config.json", "tokenizer.json", "model.safetensors"} == set(fetched)
    # one for each, and another for the connection that broke
    assert fetched.count("model.safetensors") == 3
    n_asked = len(fetched)
    # the same commit
    assert (
        load(tmp_path, at.endpoint, "org/gemma@v1") == expected[:1] and len(at.fetched()) == n_asked
    )
    unreachable = "http://127.0.0.1:9"
    assert (
        load(tmp_path, unreachable, "org/gemma")
        == load(tmp_path, at.endpoint, "org/gemma", HF_HUB_OFFLINE="1")
        == expected[:1]
    )


def test_what_cannot_be_had_is_one_line(at, tmp_path):
    missing, revision, private, refused = load(
        tmp_path, at.endpoint, "org/none", "org/gemma@v9", "private/qwen", "org/other"
    )
    nothing = f"nothing at {at.endpoint}/org/none that is open to you (HF_TOKEN)"
    assert missing == f"refused: no model 'org/none': no such folder here, and {nothing}"
    assert revision == f"refused: {at.endpoint}/org/gemma has no revision 'v9'"
    assert "refused: no model 'private/qwen'" in private
    assert "model_type 'mamba' is not supported" in refused and not any(
        "safetensors" in name for name in at.fetched()
    )
    (found,) = load(tmp_path, at.endpoint, "private/qwen", HF_TOKEN=loopback.TOKEN)
    assert found.startswith("Decoder ")


@pytest.mark.parametrize(
    ("offline", "why"),
    [("1", "HF_HUB_OFFLINE is set"), ("0", "http://127.0.0.1:9 cannot be reached")],
)
def test_without_a_network_a_line_says_what_to_download(tmp_path, offline, why):
    (line,) = load(tmp_path, "http://127.0.0.1:9", "org/gemma@v1", HF_HUB_OFFLINE=offline)
    assert why in line and "hf download org/gemma --revision v1 --local-dir FOLDER" in line


def test_a_folder_of_that_name_wins(at, tmp_path):
    tiny.write_gemma(tmp_path / "org" / "gemma", seed=5)
    (line,) = load(tmp_path / "home", at.endpoint, "org/gemma", cwd=tmp_path)
    assert (
        line == load(tmp_path / "home", at.endpoint, tmp_path / "org" / "gemma")[0] and not at.asked
    )


def test_an_adapter_by_name_is_the_one_in_its_folder(at, published, tmp_path):
    script = "import sys; from kafjax import hub; print(*sorted(p.name for p in hub.adapter_folder(sys.argv[1]).iterdir()))"
    (names,) = load(tmp_path, at.endpoint, "org/adapter", script=script)
    assert names == "adapter_config.json adapter_model.safetensors"
    assert hub.adapter_folder(str(published / "org" / "adapter")) == published / "org" / "adapter"


@pytest.mark.parametrize(
    "name", ["gemma3-270m", "a/b/c", "/a/b", "./b", "../b", "a/b@", "a b/c", "org/x@y z"]
)
def test_other_texts_are_no_names_of_the_hub(name):
    assert not remote.is_remote(name)
    with pytest.raises(UserError, match="is no name of the Hugging Face hub"):
        remote.fetch(name, remote.SETTINGS)
