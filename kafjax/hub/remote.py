"""Models and adapters by name from the Hugging Face hub: `ORG/NAME`, or `ORG/NAME@REVISION`.

huggingface_hub fetches them into its own cache, which other programs share. Its own settings apply:
HF_TOKEN (for gated models), HF_HUB_OFFLINE=1 (only the cache is used), HF_HOME or HF_HUB_CACHE (the
cache's folder), HF_ENDPOINT. Finished files are not fetched again, and a broken download resumes.
No pickle and no code is fetched. Weights are fetched only when they are read, so a model that is
refused for its configuration costs a few kilobytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kafjax.core.errors import UserError
from kafjax.hub.safetensors_out import TOKENIZER_FILES

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SENTENCE = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[0-9]_*/config.json",
)
# layers behind a pooling: small, and read with the configuration
_DENSE = ("[0-9]_*/model.safetensors",)
SETTINGS = ("config.json", *TOKENIZER_FILES, *_SENTENCE, *_DENSE)
"""Files that say what a model is, and how text becomes tokens."""
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
ADAPTER = (
    "adapter_config.json",
    "adapter_model*.safetensors",
    "adapter_model.safetensors.index.json",
)


def is_remote(name: str) -> bool:
    """True if `name` may be a name on the hub. A folder or file of that name on this machine takes
    precedence."""
    return _NAME.fullmatch(name) is not None and not Path(name).exists()


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """Returns the local folder of a name on the hub, with the files that match.

    Raises:
      UserError: there is no such name or revision, it is not open to this user, or the hub cannot
        be reached and the files are not in the cache.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(
            f"'{name}' is no name of the Hugging Face hub (ORG/NAME or ORG/NAME@REVISION)"
        )
    repo, revision = found["repo"], found["revision"]
    # half a second, and only for who needs it
    from huggingface_hub import constants, errors, snapshot_download

    at = f"{constants.ENDPOINT}/{repo}"
    command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    by_hand = f"download it where there is a network: {command} --local-dir FOLDER, and give that FOLDER instead of the name"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{at} has no revision '{revision}'") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{at} is open only to those who have accepted its terms; accept them there, and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"no model '{name}': no such folder here, and nothing at {at} that is open to you (HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.is_offline_mode()
            else f"{constants.ENDPOINT} cannot be reached"
        )
        raise UserError(
            f"no model '{name}': no such folder here, it is not in the cache, and {why}; {by_hand}"
        ) from error
    # of the network, the disk or the server, and the library names them anew now and then
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{at} cannot be fetched ({reason}); run the same command again to go on, or {by_hand}"
        ) from error
