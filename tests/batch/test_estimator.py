"""Predictions of jobs: plans made once, seconds learned by stage and shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.scheduling.estimator import Estimator, plan_key, work
from i2v_core.families import I2VModel, VideoSize
from i2v_core.memory.device import device_facts
from i2v_core.planning.plan import Stage
from i2v_core.planning.request import Budget
from i2v_core.planning.suggestions import NothingFitsError
from i2v_core.units import KIB, MIB

from .conftest import MakeJob

CPU = device_facts(torch.device("cpu"))


@pytest.fixture
def estimator(store: JobStore) -> Estimator:
    return Estimator(store, lambda _: CPU, lambda _: Budget(free_bytes=64 * MIB))


def test_more_to_do_takes_longer(estimator: Estimator, make_job: MakeJob, tiny_model: I2VModel) -> None:
    def seconds(**changes: object) -> float:
        return estimator.estimate(make_job(**changes), tiny_model.architecture).resources.seconds

    plain = seconds()
    assert seconds(steps=4) > plain
    assert seconds(size=VideoSize(width_pixels=128, height_pixels=64, frames=2)) > plain
    assert seconds(cfg=1.0) < plain
    assert seconds(seed=5, prompt="another") == plain


def test_jobs_that_are_planned_alike_share_a_plan(
    estimator: Estimator, make_job: MakeJob, tiny_model: I2VModel
) -> None:
    one, other, wider = (
        estimator.estimate(job, tiny_model.architecture)
        for job in (
            make_job(1, steps=3),
            make_job(2),
            make_job(3, size=VideoSize(width_pixels=128, height_pixels=64, frames=2)),
        )
    )
    assert one.plan is other.plan
    assert wider.plan is not one.plan
    assert wider.peak_bytes > one.peak_bytes
    assert plan_key(make_job(1)) == plan_key(make_job(2))
    assert plan_key(make_job(1)) != plan_key(make_job(1, model_identity="other weights"))


def test_what_does_not_fit_is_refused_each_time(store: JobStore, make_job: MakeJob, tiny_model: I2VModel) -> None:
    small = Estimator(store, lambda _: CPU, lambda _: Budget(free_bytes=4 * KIB))
    for _ in range(2):
        with pytest.raises(NothingFitsError, match="does not fit"):
            small.estimate(make_job(), tiny_model.architecture)


def test_seconds_are_learned_by_stage_and_scaled_to_other_jobs(
    estimator: Estimator, make_job: MakeJob, tiny_model: I2VModel
) -> None:
    job = make_job(steps=2)
    plan = estimator.estimate(job, tiny_model.architecture).plan
    estimator.learn(job, plan, Stage.SAMPLE, 10.0, steps=2)
    learned = estimator.estimate(job, tiny_model.architecture).seconds
    assert learned[Stage.SAMPLE] == pytest.approx(10.0)
    longer = estimator.estimate(make_job(steps=6), tiny_model.architecture).seconds
    assert longer[Stage.SAMPLE] == pytest.approx(30.0)
    assert longer[Stage.DECODE] == learned[Stage.DECODE]
    wide = make_job(size=replace(job.size, width_pixels=128))
    assert estimator.estimate(wide, tiny_model.architecture).seconds[Stage.SAMPLE] == pytest.approx(20.0, rel=0.1)


def test_only_the_steps_that_were_sampled_count(estimator: Estimator, make_job: MakeJob, tiny_model: I2VModel) -> None:
    """A job that went on from its checkpoint at step 15 of 20."""
    job = make_job(steps=20)
    plan = estimator.estimate(job, tiny_model.architecture).plan
    estimator.learn(job, plan, Stage.SAMPLE, 5.0, steps=5)
    assert estimator.estimate(job, tiny_model.architecture).seconds[Stage.SAMPLE] == pytest.approx(20.0)
    assert work(plan, 20)[Stage.SAMPLE] == 4 * work(plan, 5)[Stage.SAMPLE]
