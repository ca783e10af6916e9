"""What becomes of a job after an attempt."""

from __future__ import annotations

from typing import Any

import pytest

from launch.slurm.decision import (
    ENDED_BY_SLURM,
    Preflight,
    Situation,
    attempts_without_progress,
    decide,
    lost_too_often,
)
from trainer.job.directory import AttemptRecord, LastWord, Word


def word(kind: Word, reason: str = "said so") -> LastWord:
    return LastWord(word=kind, attempt="7.0", step=10, reason=reason, time=0.0)


def attempts(*steps: int | None, reason: str = "left") -> list[AttemptRecord]:
    return [AttemptRecord(attempt=f"7.{i}", began=0.0, ended=1.0, step=s, reason=reason) for i, s in enumerate(steps)]


def situation(**fields: Any) -> Situation:
    return Situation(**({"earlier": [], "word": None, "saved": 10} | fields))


def test_done_is_done() -> None:
    assert decide(situation(word=word("DONE"), saved=None)).action == "done"


def test_failed_is_not_tried_again() -> None:
    decision = decide(situation(word=word("FAILED", "no such file")))
    assert (decision.action, decision.reason) == ("fail", "no such file")


@pytest.mark.parametrize("last", [None, word("RESUME")])
@pytest.mark.parametrize(("may_requeue", "action"), [(True, "requeue"), (False, "resubmit")])
def test_a_job_goes_on_after_a_request_and_after_silence(last: LastWord | None, may_requeue: bool, action: str) -> None:
    assert decide(situation(word=last, may_requeue=may_requeue)).action == action


def test_a_job_goes_on_whose_ranks_were_still_at_work_at_the_limit() -> None:
    decision = decide(situation(late=True))
    assert (decision.action, decision.reason[:25]) == ("requeue", "did not save and leave in")
    assert decide(situation(late=True, word=word("RESUME"))).reason == "said so"
    assert decide(situation(late=True, asked="cancelled by ann")).action == "stop"


@pytest.mark.parametrize("last", [None, word("RESUME")])
def test_a_job_that_somebody_stopped_does_not_go_on(last: LastWord | None) -> None:
    decision = decide(situation(word=last, asked="cancelled by ann"))
    assert (decision.action, decision.reason) == ("stop", "stopped on request: cancelled by ann")


def test_a_job_that_was_done_when_somebody_stopped_it_is_done() -> None:
    assert decide(situation(word=word("DONE"), asked="cancelled by ann")).action == "done"


def test_steps_count_not_attempts() -> None:
    many = attempts(*range(1, 60))
    assert decide(situation(earlier=many, saved=60, limit=1)).action == "requeue"
    assert decide(situation(earlier=many, saved=59, limit=1)).action == "fail"


def test_given_up_with_the_reason() -> None:
    decision = decide(situation(earlier=attempts(5, 5), saved=5, trouble="ValueError: no", limit=2))
    assert decision.action == "fail"
    assert decision.reason == (
        "2 attempts in a row made no progress (step 5 is still the last one saved); "
        "the last one: left without a word (ValueError: no)"
    )


def test_attempts_that_take_no_steps_are_counted() -> None:
    assert attempts_without_progress(attempts(None, None), None) == 3


def test_progress_begins_the_count_anew() -> None:
    assert attempts_without_progress(attempts(None, None, 4, 4), 4) == 2
    # A checkpoint found damaged takes a run back; steps done for the second time are no progress.
    assert attempts_without_progress(attempts(8, 4), 6) == 2


def test_steps_of_a_former_launch_are_no_progress() -> None:
    assert attempts_without_progress([], 8, 8) == 1
    assert attempts_without_progress(attempts(8), 9, 8) == 0
    assert decide(situation(saved=8, step_at_launch=8, limit=1)).action == "fail"
    assert decide(situation(saved=8, step_at_launch=8, limit=2)).action == "requeue"


def test_what_slurm_took_back_counts_neither_way() -> None:
    taken = attempts(4, 4, 4, reason=ENDED_BY_SLURM)
    assert attempts_without_progress(taken, 4) == 1
    assert attempts_without_progress([*attempts(4, 4), *taken], 4) == 2


def test_a_job_that_brings_its_nodes_down_is_given_up_in_the_end() -> None:
    lost = attempts(*[4] * 10, reason=ENDED_BY_SLURM)
    # The first of them took the step to 4.
    assert lost_too_often(lost) is None
    assert "bring its nodes down" in str(lost_too_often([*lost, *attempts(4, reason=ENDED_BY_SLURM)]))
    assert lost_too_often([*lost, *attempts(4)]) is None
    assert "10 attempts without progress" in str(lost_too_often(lost, 4))
    assert lost_too_often([*lost, *attempts(5, reason=ENDED_BY_SLURM)], 4) is None


class TestPreflight:
    def test_the_job_goes_on_without_a_bad_node(self) -> None:
        found = Preflight(ok=False, bad_nodes=("node2",), problems=("node2: no GPU",))
        decision = decide(situation(saved=None, preflight=found, nodes=("node1", "node2")))
        assert (decision.action, decision.exclude) == ("requeue", ("node2",))
        assert decision.reason == "the check of the nodes failed: node2: no GPU; going on without node2"

    def test_excluding_is_given_up_like_anything_else(self) -> None:
        found = Preflight(ok=False, bad_nodes=("node2",), problems=("node2: no GPU",))
        assert decide(situation(earlier=attempts(None, None), saved=None, preflight=found)).action == "fail"

    def test_what_is_no_node_s_fault_fails(self) -> None:
        found = Preflight(ok=False, problems=("torch differs", "the disk is full"))
        decision = decide(situation(preflight=found))
        assert decision.action == "fail"
        assert "torch differs; the disk is full" in decision.reason

    def test_what_all_nodes_share_fails(self) -> None:
        found = Preflight(ok=False, bad_nodes=("node1", "node2"), problems=("no network",))
        assert decide(situation(preflight=found, nodes=("node1", "node2"))).action == "fail"
        assert decide(situation(preflight=found, nodes=("node1", "node2", "node3"))).action == "requeue"
