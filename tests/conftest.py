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
    _preprocessor(folder / "feature_extractor", side_pixels=32)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "I2VGenXLPipeline"}))


def _preprocessor(folder: Path, side_pixels: int) -> None:
    """Of a CLIP vision encoder."""
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side_pixels, "width": side_pixels},
        "size": {"shortest_edge": side_pixels},
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def save_tiny_svd(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **save: Any) -> None:
    """A Stable Video Diffusion of random weights in diffusers layout; `save` goes to every `save_pretrained`."""
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    width = 32
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=width,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    autoencoder: Any = AutoencoderKLTemporalDecoder  # its annotations say tuples of one
    vae = autoencoder(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=1,
        sample_size=64,
        force_upcast=False,
    )
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=224,  # what diffusers' pipeline scales to, whatever the config
            patch_size=56,
            projection_dim=width,
        )
    )
    modules = {"unet": unet, "vae": vae, "image_encoder": vision}
    for name, module in modules.items():
        module.to(dtype).save_pretrained(folder / name, safe_serialization=True, **save)
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    _preprocessor(folder / "feature_extractor", side_pixels=224)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableVideoDiffusionPipeline"}))


WAN_LAYOUTS = ("wan2.1-i2v", "wan2.2-a14b", "wan2.2-ti2v")
"""The picture in the context as well; two experts; the picture as the first latent frame."""


def _umt5_tokenizer(folder: Path) -> int:
    """A tokenizer of a few words; the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast: Any = PreTrainedTokenizerFast
    fast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    ).save_pretrained(str(folder))
    return len(words)


def save_tiny_wan(
    folder: Path,
    *,
    layout: str = WAN_LAYOUTS[0],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **save: Any,
) -> None:
    """A Wan of random weights in diffusers layout, every one of which matters; `save` goes to `save_pretrained`."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    sees, two, begins = (layout == it for it in WAN_LAYOUTS)
    width, channels = 32, 48 if begins else 16
    vocabulary_size = _umt5_tokenizer(folder / "tokenizer")

    def transformer() -> Any:
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=channels if begins else 36,
            out_channels=channels,
            text_dim=width,
            freq_dim=16,
            ffn_dim=112,
            num_layers=2,
            rope_max_seq_len=64,
            image_dim=width if sees else None,
            added_kv_proj_dim=48 if sees else None,
        )

    residual = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    autoencoder: Any = AutoencoderKLWan
    vae = autoencoder(
        base_dim=8,
        z_dim=channels,
        num_res_blocks=1,
        latents_mean=torch.randn(channels).tolist(),
        latents_std=(0.5 + torch.rand(channels)).tolist(),
        **(residual if begins else {}),
    )
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=vocabulary_size, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    modules: dict[str, Any] = {"transformer": transformer(), "vae": vae, "text_encoder": text}
    if two:
        modules["transformer_2"] = transformer()
    if sees:
        modules["image_encoder"] = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
        )
        _preprocessor(folder / "image_processor", side_pixels=32)
    for name, module in modules.items():
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2 / max(1, parameter[0].numel()) ** 0.5)
        torch.nn.Module.to(module, dtype)
        module.save_pretrained(folder / name, safe_serialization=True, **save)
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(
        folder / "scheduler"
    )
    index: dict[str, Any] = {"_class_name": "WanPipeline" if begins else "WanImageToVideoPipeline"}
    index |= {"expand_timesteps": True} if begins else {}
    index |= {"boundary_ratio": 0.9} if two else {"boundary_ratio": None}
    (folder / "model_index.json").write_text(json.dumps(index))


TINY_MODELS: dict[str, Callable[..., None]] = {"i2vgen-xl": save_tiny_i2vgen_xl, "svd": save_tiny_svd}
"""How a small model of each family is written: a family that is added here runs through the tests of all families."""


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


SCREENSHOTS = Path(__file__).resolve().parents[1] / "build" / "screenshots"
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
    if SCREENSHOTS.is_dir():
        terminalreporter.write_line(f"screenshots of the page: {SCREENSHOTS}")


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
def tiny_models() -> dict[str, Callable[..., None]]:
    return TINY_MODELS


@pytest.fixture(scope="session")
def save_wan() -> Callable[..., None]:
    """Writes a small Wan into a folder."""
    return save_tiny_wan


@pytest.fixture(scope="session", params=TINY_MODELS)
def family_name(request: pytest.FixtureRequest) -> str:
    """What a test asks for that every family must pass."""
    return request.param


@pytest.fixture(scope="session")
def family_folder(family_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of the family that all tests share; copy it to change it."""
    folder = tmp_path_factory.mktemp("models") / family_name
    TINY_MODELS[family_name](folder)
    return folder


@pytest.fixture(scope="session", params=WAN_LAYOUTS)
def wan_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Wan of each layout that all tests share; copy it to change it."""
    folder = tmp_path_factory.mktemp("models") / request.param
    save_tiny_wan(folder, layout=request.param)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small I2VGen-XL that all tests share; copy it to change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_i2vgen_xl(folder)
    return folder
