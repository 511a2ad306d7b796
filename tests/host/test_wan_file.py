"""A Wan in a real host whose transformer is a GGUF file among the host's diffusion models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from comfy_host.client import Client, ExecutionError
from comfy_host.server import Server

from tests.host.conftest import PICTURE
from tests.host.test_routes import ask, plan
from tests.wan_files import save_wan_of_blocks, tiny_transformer, write_gguf

SIZE = {"width": 96, "height": 64, "frames": 9}
FILE, WRONG = "wan/tiny-Q4_0.gguf", "tiny-t2v-Q4_0.gguf"

GRAPH = """() => {
  const [loader, budget] = ["I2VLoader", "I2VVRAMBudget"].map((type) => LiteGraph.createNode(type));
  budget.pos = [420, 80];
  app.graph.add(loader);
  app.graph.add(budget);
  loader.connect(0, budget, 0);
}"""


@pytest.fixture(scope="module")
def wan(server: Server, save_wan: Callable[..., None]) -> Iterator[str]:
    """The model's name in the loader: a folder without the transformer's weights, which are in `FILE`."""
    folder, files = (server.models_folder / name for name in ("diffusers/wan-of-blocks", "diffusion_models"))
    made = save_wan_of_blocks(save_wan, folder)
    (files / FILE).parent.mkdir(parents=True)
    write_gguf(files / FILE, made["transformer"].state_dict())
    write_gguf(files / WRONG, tiny_transformer(sees=False, in_channels=16).state_dict())
    yield folder.name
    for file in (files / FILE, files / WRONG):
        file.unlink()


def prompt_for(make_prompt: Any, loader: dict[str, Any], budget: dict[str, Any] | None = None) -> Any:
    return make_prompt(loader=loader, budget={**SIZE, **(budget or {})}, sampler={"scheduler": "auto"})


def test_the_loader_lists_the_files(client: Client, wan: str) -> None:
    assert wan
    listed = client.object_info()["I2VLoader"]["input"]["optional"]
    for name in ("transformer_file", "low_noise_file"):
        options = listed[name][1].get("options") or listed[name][0]
        assert options == ["from the model's folder", WRONG, FILE]


def test_a_video_is_made_and_the_plan_says_that_it_is_approximate(
    client: Client, server: Server, make_prompt: Any, wan: str
) -> None:
    run = client.run(prompt_for(make_prompt, {"model": wan, "transformer_file": FILE}))
    assert len(run.outputs["save"]["images"]) == 9
    told = run.outputs["budget"]["i2v_plan"][0]
    assert told["file_formats"] == ["Q4_0", "Q8_0"]
    assert any("Q4_0, Q8_0 weights: approximate" in reason for reason in told["reasons"])
    live = plan(
        server, model=wan, transformer_file=FILE, low_noise_file="from the model's folder", **SIZE, budget="64MiB"
    )
    assert live["fits"]
    assert "approximate: Q4_0, Q8_0 weights" in [it["text"] for it in live["given_up"]]


def test_the_page_is_told_what_the_file_saves(server: Server, wan: str) -> None:
    budget = {**SIZE, "precision": "bf16", "budget": "64MiB"}
    exact, quantised = (plan(server, model=wan, **chosen, **budget) for chosen in ({}, {"transformer_file": FILE}))
    weights = [
        next(it["weights_bytes"] for it in live["stages"] if it["stage"] == "sample") for live in (exact, quantised)
    ]
    assert weights[1] < 0.8 * weights[0]


@pytest.mark.parametrize(
    ("chosen", "error", "said"),
    [
        ({"transformer_file": WRONG}, "ModelFolderError", "takes 16 channels, not 36: it makes videos of text alone"),
        ({"transformer_file": FILE, "low_noise_file": FILE}, "BadInputError", "has no transformer_2"),
        ({}, "ModelFolderError", "transformer/diffusion_pytorch_model.safetensors is missing"),
        ({"model": "tiny", "transformer_file": FILE}, "BadInputError", "I2VGen-XL takes no file for its transformer"),
    ],
    ids=["of text alone", "no second expert", "no weights at all", "another family"],
)
def test_what_does_not_belong_together_is_refused(
    client: Client, make_prompt: Any, wan: str, chosen: dict[str, str], error: str, said: str
) -> None:
    with pytest.raises(ExecutionError) as refusal:
        client.run(prompt_for(make_prompt, {"model": wan, **chosen}))
    assert refusal.value.exception_type.rpartition(".")[2] == error
    assert said in refusal.value.message


def test_a_batch_is_planned_for_the_file_too(client: Client, server: Server, make_prompt: Any, wan: str) -> None:
    """Each job is planned for the weights that the node's plan names."""
    prompt = prompt_for(make_prompt, {"model": wan, "transformer_file": FILE})
    jobs, made = server.input_folder / "from_a_file.csv", server.output_folder / "made_from_a_file"
    jobs.write_text(f"image,prompt\n{PICTURE},a red circle\n", "utf-8")
    inputs = {
        "model": ["loader", 0],
        "plan": ["budget", 0],
        "jobs": jobs.name,
        "prompts": "",
        "negative_prompt": "",
        "steps": 1,
        "cfg": 2.0,
        "seed": 0,
        "scheduler": "auto",
        "fps": 8.0,
        "format": "mp4",
        "priority": 1.0,
        "rule": "weight",
        "output_folder": made.name,
    }
    batch = {"class_type": "I2VBatch", "inputs": inputs}
    try:
        run = client.run({"loader": prompt["loader"], "budget": prompt["budget"], "batch": batch})
        (text,) = run.outputs["batch"]["text"]
        assert text.startswith("1 done"), text
        assert len(list(made.glob("*.mp4"))) == 1
    finally:
        jobs.unlink()
        for folder in (made, server.user_folder / "i2v_budget"):
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("loaded_page", [("server", False), ("server", True)], ids=["classic", "nodes2"], indirect=True)
def test_the_page_plans_for_the_file_that_is_chosen(page: Any, wan: str) -> None:
    shown = "document.querySelector('.i2v-live.fits')?.textContent"
    page.raw.evaluate(GRAPH)
    page.set("I2VVRAMBudget", {**SIZE, "budget": "64MiB"})
    page.set("I2VLoader", {"model": wan})
    page.wait("an exact plan", f"{shown} && !{shown}.includes('Q4_0')")
    page.set("I2VLoader", {"transformer_file": FILE})
    page.wait("the file's formats", f"{shown}?.includes('approximate: Q4_0, Q8_0 weights')")


@pytest.mark.parametrize("name", ["absent.gguf", "../../secret.safetensors", "/etc/passwd", "wan"])
def test_names_that_are_not_listed_are_refused(server: Server, wan: str, name: str) -> None:
    status, answer = ask(server, model=wan, transformer_file=name)
    assert status == 400
    assert "transformer_file" in answer["error"]["problem"] or "there is no weight file" in answer["error"]["problem"]


def test_experts_that_are_exchanged_are_noticed_by_their_names(server: Server, wan: str) -> None:
    files = server.models_folder / "diffusion_models"
    names = ["wan_low_noise.gguf", "wan_high_noise.gguf"]
    for name in names:
        (files / name).write_bytes((files / FILE).read_bytes())
    try:
        status, answer = ask(server, model=wan, transformer_file=names[0], low_noise_file=names[1])
    finally:
        for name in names:
            (files / name).unlink()
    assert status == 400
    assert answer["error"]["remedy"].startswith("swap")
