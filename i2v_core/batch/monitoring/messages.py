"""Sentences for people about the values that scheduling and admission return."""

from __future__ import annotations

from ...units import format_gib
from ...words import Message, message
from ..devices.admission import AdmissionRequest, BlockingCause, BlockingReason
from ..devices.device import DeviceStatus
from ..scheduling.policy import Policy, ScoreBreakdown


def score_message(score: ScoreBreakdown) -> Message:
    """Why a waiting job has its place."""
    waited = f"{score.waited_seconds:.0f}"
    if score.position is not None:
        return message("whyByHand", place=score.position + 1)
    if score.policy is Policy.FIRST_COME:
        return message("whyFirstCome", waited=waited)
    return message(
        "whyScoreLoaded" if score.loaded > 1 else "whyScore",
        score=f"{score.score:.3g}",
        weight=f"{score.weight:.3g}",
        seconds=f"{score.estimate.seconds:.1f}",
        amount=format_gib(score.estimate.peak_bytes),
        priority=f"{score.priority:g}",
        ageing=f"{score.ageing:.3g}",
        waited=waited,
        loaded=f"{score.loaded:g}",
    )


def blocking_text(reason: BlockingReason) -> str:
    """Why a stage waits for memory."""
    waits_for = " and ".join(map(_request_text, reason.waits_for))
    request = _request_text(reason.request)
    if reason.cause is BlockingCause.OTHER_PROGRAMS:
        others, usable = format_gib(reason.memory.others_bytes), format_gib(reason.memory.usable_bytes)
        return f"{request} waits for other programs, which hold {others}: {usable} are left"
    if reason.cause is BlockingCause.RUNNING_STAGES:
        return f"{request} waits for {waits_for} to end: {format_gib(reason.free_bytes)} are free"
    return f"{request} lets {waits_for} go first"


def waiting_texts(status: DeviceStatus) -> tuple[str, ...]:
    """Why stages and jobs wait for memory of a device."""
    texts = [blocking_text(reason) for reason in status.waits]
    if status.too_large_now:
        jobs = "1 waiting job does" if status.too_large_now == 1 else f"{status.too_large_now} waiting jobs do"
        held = format_gib(status.room.others_bytes)
        texts.append(f"{jobs} not fit beside other programs, which hold {held}")
    return tuple(texts)


def _request_text(request: AdmissionRequest) -> str:
    return f"{request.stage.value} of job {request.job} ({format_gib(request.needed_bytes)})"
