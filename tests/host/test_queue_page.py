"""The queue's tab on the real page, in a browser: what it lists, and that its buttons act."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comfy_host.server import Server

from i2v_core.batch.jobs.job import JobSpec, JobState
from i2v_core.batch.jobs.leases import LeaseManager
from i2v_core.batch.jobs.store import JobStore
from i2v_core.families import VideoSize

from .conftest import PICTURE

pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

pytestmark = [pytest.mark.browser, pytest.mark.slow]

OPEN = "app.extensionManager.sidebarTab.toggleSidebarTab('i2v_budget.queue')"

REMARKS = [
    {"key": "remarkWaiting", "values": {"share": "40%", "healthy": "10%"}, "text": "stages wait for memory"},
    {"key": "remarkOfANewerServer", "values": {}, "text": "something costs $5"},
]

OpenPage = Callable[..., Any]


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Server:
    """The host whose queue it is: the one with its own page, or as a test's parameter says."""
    return request.getfixturevalue(getattr(request, "param", "server"))


@pytest.fixture
def open_page(chromium: Any, host: Server) -> Iterator[OpenPage]:
    """Opens the page with the queue's tab; or with it closed."""
    from comfy_host.page import opened

    with ExitStack() as stack:

        def open_it(*, tab: bool = True, **settings: Any) -> Any:
            page = stack.enter_context(opened(chromium, host.url, **{"nodes_2": False, **settings})).raw
            if tab:
                page.evaluate(OPEN)
                page.wait_for_selector(".i2v-queue .summary:not(:empty)")
            return page

        yield open_it


@pytest.fixture
def store(host: Server) -> Iterator[JobStore]:
    opened = JobStore(host.user_folder / "i2v_budget" / "jobs.queue")
    yield opened
    path = opened.database.path
    opened.close()
    for found in path.parent.glob(f"{path.name}*"):
        found.unlink()


@pytest.fixture
def ids(host: Server, store: JobStore) -> list[int]:
    """Four jobs that wait, the first with the most seconds to go, so that they run in this order."""
    spec = JobSpec(
        model=Path("model"),
        image=host.input_folder / PICTURE,
        prompt="a circle moves",
        size=VideoSize(width_pixels=64, height_pixels=64, frames=4),
        steps=2,
        cfg=1.0,
        fps=8.0,
    )
    ids = list(store.add(replace(spec, seed=seed) for seed in range(4)))
    store.note_predictions([(job, 400.0 - 100 * place, 3 << 30) for place, job in enumerate(ids)])
    return ids


def card(page: Any, job: int) -> Any:
    return page.locator(f".i2v-queue li[data-job='{job}']")


def listed(page: Any) -> list[int]:
    return [
        int(it) for it in page.locator(".i2v-queue .jobs > li").evaluate_all("all => all.map((it) => it.dataset.job)")
    ]


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
@pytest.mark.parametrize("host", ["server", "newest_page_server"], ids=["own page", "newest page"], indirect=True)
def test_it_lists_jobs_with_what_is_known_of_them(
    open_page: OpenPage, host: Server, store: JobStore, ids: list[int], nodes_2: bool
) -> None:
    leases = LeaseManager(store)
    leases.claim(ids[0], "a card")
    leases.renew({ids[0]: ("sample", 7, 25)})
    video = host.output_folder / "clip.mp4"
    video.touch()
    leases.claim(ids[1], "a card")
    leases.finish(ids[1], video, {"stages": [{"seconds": 75}]}, 2 << 30)
    leases.claim(ids[2], "a card")
    leases.fail(ids[2], "it did not work", {}, attempts=1)
    page = open_page(nodes_2=nodes_2, tab=False)
    page.locator(".side-bar-button", has=page.locator(".pi-video")).click()
    page.wait_for_selector(".i2v-queue li")
    assert listed(page) == [ids[0], ids[3], ids[2], ids[1]]
    assert page.text_content(".i2v-queue .summary").startswith("1 running · 1 waiting · 1 failed · 1 done")
    running, waiting, failed, done = (card(page, job) for job in (ids[0], ids[3], ids[2], ids[1]))
    # Of 400 s, less those that it takes a busy machine to open the page.
    assert re.search(r"sample 7 of 25 · [5-7] min left", running.inner_text())
    assert running.locator("progress").evaluate("it => it.value / it.max") == 7 / 25
    assert "predicted 3.00\u00a0GiB" in waiting.inner_text()
    assert waiting.locator("img").evaluate("it => it.decode().then(() => it.naturalWidth)") == 96
    assert "it did not work" in failed.inner_text()
    assert "took 1 min" in done.inner_text()
    assert "measured 2.00\u00a0GiB" in done.inner_text()
    assert "filename=clip.mp4" in done.locator("a").get_attribute("href")
    waiting.get_by_text("Why in this position").click()
    waiting.get_by_text("score ").wait_for()
    leases.renew({ids[0]: ("decode", 3, 4)})
    running.get_by_text("decode 3 of 4").wait_for()


def test_its_buttons_act_on_a_job(open_page: OpenPage, store: JobStore, ids: list[int]) -> None:
    page = open_page()
    job = card(page, ids[1])
    for button, state in (
        ("Pause", JobState.PAUSED),
        ("Resume", JobState.WAITING),
        ("Cancel", JobState.CANCELLED),
        ("Retry", JobState.WAITING),
    ):
        job.get_by_role("button", name=button).click()
        job.locator(".state", has_text=state.value).wait_for()
        assert store.job(ids[1]).state is state
    LeaseManager(store).claim(ids[1], "a card")
    job.locator(".state", has_text="running").wait_for()
    job.get_by_role("button", name="Cancel").click()
    job.get_by_text("cancelling").wait_for()
    assert job.locator("button:visible").count() == 0


def test_the_queue_is_paused_and_resumed(open_page: OpenPage, store: JobStore, ids: list[int]) -> None:
    page = open_page()
    page.get_by_role("button", name="Pause queue").click()
    page.get_by_role("button", name="Resume queue").wait_for()
    assert store.paused
    assert "no new jobs are started" in page.text_content(".i2v-queue .summary")
    page.get_by_role("button", name="Resume queue").click()
    page.get_by_role("button", name="Pause queue").wait_for()
    assert not store.paused


def test_priority_and_place_change_the_order(open_page: OpenPage, store: JobStore, ids: list[int]) -> None:
    page = open_page()
    priority = card(page, ids[3]).get_by_label("Priority")
    priority.fill("9")
    priority.press("Enter")
    page.wait_for_function(f"document.querySelector('.i2v-queue li').dataset.job === '{ids[3]}'")
    assert store.job(ids[3]).spec.priority == 9
    card(page, ids[1]).get_by_role("button", name="Move up").click()
    page.wait_for_function(f"document.querySelectorAll('.i2v-queue li')[1].dataset.job === '{ids[1]}'")
    assert listed(page) == [ids[3], ids[1], ids[0], ids[2]]
    assert [store.job(job).position for job in (ids[3], ids[1], ids[0])] == [0, 1, None]
    card(page, ids[3]).get_by_role("button", name="Move down").click()
    page.wait_for_function(f"document.querySelector('.i2v-queue li').dataset.job === '{ids[1]}'")
    assert listed(page) == [ids[1], ids[3], ids[0], ids[2]]
    assert card(page, ids[1]).get_by_role("button", name="Move up").is_disabled()


def test_a_refusal_is_said(open_page: OpenPage, store: JobStore, ids: list[int]) -> None:
    page = open_page()
    priority = card(page, ids[0]).get_by_label("Priority")
    priority.fill("-1")
    priority.press("Enter")
    page.locator("[role=alert]", has_text="a priority of -1 is not possible").wait_for()
    assert store.job(ids[0]).spec.priority == 1


def test_the_keyboard_is_enough_and_keeps_its_place(open_page: OpenPage, store: JobStore, ids: list[int]) -> None:
    page = open_page()
    page.get_by_role("button", name="Pause queue").focus()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Pause":
            break
    page.keyboard.press("Enter")
    card(page, ids[0]).locator(".state", has_text="paused").wait_for()
    assert store.job(ids[0]).state is JobState.PAUSED
    focused = "document.activeElement.closest('li')?.dataset.job"
    assert page.evaluate(focused) == str(ids[0])
    store.cancel(ids[2])
    card(page, ids[2]).locator(".state", has_text="cancelled").wait_for()
    assert page.evaluate(focused) == str(ids[0])


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_it_is_chinese_on_a_chinese_page_and_its_text_stands_out(
    open_page: OpenPage, store: JobStore, ids: list[int], theme: str
) -> None:
    page = open_page(Comfy_ColorPalette=theme, Comfy_Locale="zh")
    page.get_by_role("button", name="暂停队列").wait_for()
    assert "等待中" in card(page, ids[0]).inner_text()
    colour = page.evaluate("getComputedStyle(document.querySelector('.i2v-queue')).color")
    channels = [int(it) for it in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    assert min(channels) > 180 if theme == "dark" else max(channels) < 80
    card(page, ids[0]).get_by_role("button", name="取消").click()
    card(page, ids[0]).locator(".state", has_text="已取消").wait_for()
    assert store.job(ids[0]).state is JobState.CANCELLED


def test_why_a_job_waits_is_said_in_the_pages_language(open_page: OpenPage, ids: list[int]) -> None:
    page = open_page(Comfy_Locale="zh")
    waiting = card(page, ids[0])
    waiting.get_by_text("为什么排在这里").click()
    waiting.get_by_text("得分 ").wait_for()
    assert "（400.0 秒 ÷ 3.00 GiB × 优先级 1）" in waiting.inner_text()


def test_remarks_are_in_the_pages_language_and_unknown_ones_as_they_come(open_page: OpenPage, ids: list[int]) -> None:
    page = open_page(Comfy_Locale="zh")

    def with_remarks(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "remarks": REMARKS})

    page.route("**/i2v_budget/queue", with_remarks)
    page.locator(".i2v-queue .waits li").nth(1).wait_for()
    known, unknown = page.locator(".i2v-queue .waits li").all_text_contents()
    assert known == "各阶段有 40% 的时间在等待显存（正常：不超过 10%）：任务太大，无法同时运行"
    assert unknown == REMARKS[1]["text"]
    assert card(page, ids[0]).is_visible()


def test_it_asks_only_while_it_is_open(open_page: OpenPage, ids: list[int]) -> None:
    page = open_page(tab=False)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("budget/queue") else None)
    with page.expect_response("**/i2v_budget/queue"):
        page.evaluate(OPEN)
    page.evaluate(OPEN)
    page.wait_for_selector(".i2v-queue", state="detached")
    count = len(asked)
    assert count > 0
    page.wait_for_timeout(2500)
    assert len(asked) <= count + 1  # one may have been on its way
