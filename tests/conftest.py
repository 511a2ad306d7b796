"""Small real models for all tests: real diffusers and transformers classes, random weights, a few hundred kilobytes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ("a", "red", "blue", "circle", "square", "moves", "left", "right", "up", "down", "and", "stays")


def _tokenizer(folder: Path) -> None:
    """A CLIP tokenizer that knows letters and a few words."""
    letters = [chr(code) for code in range(33, 127)]
    merges: list[str] = []
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            if merge not in merges:
                merges.append(merge)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if pieces[0] not in vocabulary:
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 16,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({name: token for name, token in config.items() if name.endswith("_token")})
    )


def save_tiny_i2vgen_xl(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **save: Any) -> None:
    """An I2VGen-XL of random weights in diffusers layout; `save` goes to every `save_pretrained`."""
    from diffusers import AutoencoderKL, DDIMScheduler, I2VGenXLUNet
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    width = 32
    _tokenizer(folder / "tokenizer")
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    unet = I2VGenXLUNet(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=8,
    )
    autoencoder: Any = AutoencoderKL  # its annotations say tuples of one
    vae = autoencoder(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        force_upcast=False,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )
    )
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=width,
        )
    )
    modules = {"unet": unet, "vae": vae, "text_encoder": text, "image_encoder": vision}
    for name, module in modules.items():
        module.to(dtype).save_pretrained(folder / name, safe_serialization=True, **save)
    DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 32, "width": 32},
        "size": {"shortest_edge": 32},
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "I2VGenXLPipeline"}))


def pytest_configure() -> None:
    """Tests in several processes share the cores; threads that wait for each other's cores make them slower."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a CUDA device are skipped, and said to be, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


FAULTS = pytest.StashKey[Counter[str]]()


@pytest.fixture(scope="session")
def survived(pytestconfig: pytest.Config) -> Counter[str]:
    """Faults that were put in and survived, by kind; their number is said at the end of all tests."""
    return pytestconfig.stash.setdefault(FAULTS, Counter())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where tests run in several processes, each hands its count to the one that started it."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["faults"] = dict(session.config.stash.get(FAULTS, Counter[str]()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash.setdefault(FAULTS, Counter()).update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    faults = config.stash.get(FAULTS, Counter[str]())
    if faults:
        kinds = ", ".join(f"{count} {kind}" for kind, count in faults.most_common())
        terminalreporter.write_line(f"faults tried and survived: {faults.total()} ({kinds})")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Many threads slow tiny operations down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def save_tiny_model() -> Callable[..., None]:
    """Writes a small I2VGen-XL into a folder."""
    return save_tiny_i2vgen_xl


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small I2VGen-XL that all tests share; copy it to change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_i2vgen_xl(folder)
    return folder
