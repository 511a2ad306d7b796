"""Scenes, prompts and verdicts of the demo model, on drawn clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.demo_model.clips import COLOURS, SHAPES, UNSEEN, coverage
from training.demo_model.groups import Cast
from training.demo_model.measure import NEAR, judge
from training.demo_model.scenes import DIRECTIONS, Scene, combinations, motion_of, one_shape, recoloured, two_shapes

SIZE, FRAMES, TRAVEL = 96, 5, 0.25


def drawn(scene: Scene, actions: tuple[str, ...]) -> torch.Tensor:
    return scene.clip(tuple(motion_of(action, TRAVEL) for action in actions), FRAMES, SIZE)


@pytest.mark.parametrize("seed", range(5))
def test_shapes_never_meet_nor_leave_whatever_the_actions(seed: int) -> None:
    scene, _ = two_shapes(np.random.default_rng(seed), TRAVEL, inside=True)
    choices = combinations(scene, TRAVEL)
    assert len(set(choices)) == len(choices) >= len(DIRECTIONS)
    whole = [float(coverage(sprite, SIZE).sum()) for sprite in scene.sprites]
    for actions in choices:
        motions = [motion_of(action, TRAVEL) for action in actions]
        for part in np.linspace(0, 1, FRAMES):
            covers = [
                coverage(sprite.moved(dx * part, dy * part), SIZE)
                for sprite, (dx, dy) in zip(scene.sprites, motions, strict=True)
            ]
            assert not (covers[0] * covers[1]).any()
            for cover, area in zip(covers, whole, strict=True):
                assert float(cover.sum()) == pytest.approx(area, rel=0.05)


def test_training_draws_no_combination_that_is_kept_for_the_benchmark() -> None:
    rng = np.random.default_rng(0)
    sprites = [sprite for _ in range(200) for sprite in two_shapes(rng, TRAVEL)[0].sprites]
    seen = {(sprite.colour, sprite.shape) for sprite in sprites}
    assert seen == {(colour, shape) for colour in COLOURS for shape in SHAPES} - UNSEEN


def test_any_colours_stay_away_from_what_is_kept_for_the_benchmark() -> None:
    rng = np.random.default_rng(0)
    names: set[str] = set()
    for _ in range(100):
        sprite = recoloured(rng, one_shape(rng, TRAVEL)).sprites[0]
        names.add(sprite.colour)
        for colour, shape in UNSEEN:
            distance = np.linalg.norm(np.subtract(sprite.rgb, COLOURS[colour]))
            assert shape != sprite.shape or (distance > NEAR and sprite.colour != colour)
    assert names == {"", *COLOURS}


@pytest.mark.parametrize("shapes", [("circle", "circle"), ("circle", "square")])
def test_a_name_that_leaves_something_out_still_names_one_shape(shapes: tuple[str, str]) -> None:
    cast = Cast(names=(("red", shapes[0]), ("blue", shapes[1])), actions=())
    rng = np.random.default_rng(0)
    prompts = [cast.prompt(("left", "up"), rng) for _ in range(300)]
    lacking = 0
    for prompt in prompts:
        for clause in prompt.split(" and "):
            words = set(clause.split())
            fitting = [{colour, shape} & words == words & {*COLOURS, *SHAPES} for colour, shape in cast.names]
            assert sum(fitting) == 1
            lacking += not (words & set(COLOURS) and words & set(SHAPES))
    assert lacking > 50


def test_a_drawn_clip_follows_its_own_prompt_and_no_other() -> None:
    scene = one_shape(np.random.default_rng(0), TRAVEL, inside=True)
    picture = scene.picture(SIZE)
    for shown in (*DIRECTIONS, "stays"):
        clip = drawn(scene, (shown,))
        verdicts = {asked: judge(clip, picture, scene.sprites[0], asked, TRAVEL) for asked in (*DIRECTIONS, "stays")}
        assert [asked for asked, verdict in verdicts.items() if verdict.followed] == [shown]
        assert not any(verdict.lost for verdict in verdicts.values())
        assert verdicts[shown].colour_distance < 0.02
        assert verdicts[shown].first_frame_psnr > 60


def test_a_shape_that_changes_colour_or_fades_is_lost() -> None:
    scene = one_shape(np.random.default_rng(0), TRAVEL, inside=True)
    picture, sprite = scene.picture(SIZE), scene.sprites[0]
    other = next(rgb for colour, rgb in COLOURS.items() if colour != sprite.colour)
    cover = coverage(sprite, SIZE)
    for rgb, share in ((other, 1.0), ((0.5, 0.5, 0.5), 0.8)):
        last = torch.lerp(picture, torch.tensor(rgb).view(3, 1, 1) * 2 - 1, cover * share)
        assert judge(torch.stack([picture, last]), picture, sprite, "stays", TRAVEL).lost
