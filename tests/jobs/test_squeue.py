"""What SLURM's tools print, as Slurm 22.05 printed it, read into one form."""

import time

import pytest

from launch.slurm.squeue import parse_duration, parse_sacct, parse_scontrol, parse_squeue
from launch.slurm.states import explain_end, explain_wait, has_ended, is_held, is_waiting
from trainer.errors import InputError

# squeue --noheader --array --all --states=all -o SQUEUE_FORMAT; the separator is shown as ^.
QUEUE = """\
3_2^3^2^PENDING^JobArrayTaskLimit^N/A^N/A^0:00^5:00^^(null)^/runs/a/job/job.sh
3_0^3^0^RUNNING^None^2026-12-01T04:08:04^2026-12-01T04:13:04^1-02:00:20^2-00:00:00^node1^(null)^/runs/a/job/job.sh
2^2^N/A^PENDING^Resources^2026-12-01T04:18:04^2026-12-01T04:28:04^0:00^UNLIMITED^^(null)^/runs/with
a line break ^ and more/job/job.sh
11^11^N/A^CANCELLED^DependencyNeverSatisfied^2026-12-01T04:11:01^2026-12-01T04:11:01^0:00^1:00:00^^afterok:10(failed)^(null)
3_3^3^3^PENDING^job requeued in held state^N/A^N/A^0:00^5:00^^(null)^/runs/a/job/job.sh
15^15^N/A^PENDING^Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions^N/A^N/A\
^0:00^1:00:00^^(null)^/runs/a/job/job.sh
""".replace("^", "\x1f").replace("\x1f and", "^ and")

# scontrol show job 3: the task that runs has a number of its own, the waiting ones share a record.
RECORDS = """\
JobId=3 ArrayJobId=3 ArrayTaskId=2-3%2 ArrayTaskThrottle=2 JobName=a JobState=FAILED
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901757 Nice=0 Account=(null) QOS=(null)
   JobState=PENDING Reason=JobArrayTaskLimit Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=00:05:00 TimeMin=N/A
   SubmitTime=2026-12-01T04:08:03 EligibleTime=Unknown
   StartTime=Unknown EndTime=Unknown Deadline=N/A
   Partition=low AllocNode:Sid=localhost:3048
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=
   Command=/runs/a b/job/job.sh
   WorkDir=/tmp/h6try
   Power=


JobId=8 ArrayJobId=3 ArrayTaskId=1 ArrayTaskThrottle=2 JobName=a
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   RunTime=00:00:02 TimeLimit=00:05:00 TimeMin=N/A
   SubmitTime=2026-12-01T04:08:03 EligibleTime=2026-12-01T04:08:04
   StartTime=2026-12-01T04:08:04 EndTime=2026-12-01T04:13:04 Deadline=N/A
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=node[1-2]
   BatchHost=node1
   Command=/runs/a b/job/job.sh
   WorkDir=/tmp/h6try

"""

# sacct -n -P -X -o SACCT_FORMAT
ACCOUNTS = """\
2^CANCELLED by 0^2026-12-01T04:29:41^2026-12-01T04:29:46^00:00:05^00:01:00^node1^2026-12-01T04:29:40
3^PENDING^Unknown^Unknown^00:00:00^01:00:00^None assigned^2026-12-01T04:29:40
1_1^FAILED^2026-12-01T04:29:41^2026-12-01T04:29:43^00:00:02^01:00:00^node1^2026-12-01T04:29:40
""".replace("^", "\x1f")


def test_squeue_lists_each_task_with_its_time_and_its_script() -> None:
    jobs = {job.job_id: job for job in parse_squeue(QUEUE)}
    assert list(jobs) == ["3_2", "3_0", "2", "11", "3_3", "15"]
    running = jobs["3_0"]
    assert (running.base, running.task, running.nodes, running.reason) == ("3", 0, "node1", "")
    assert (running.elapsed, running.limit) == (26 * 3600 + 20, 48 * 3600)
    assert time.localtime(running.end)[:6] == (2026, 12, 1, 4, 13, 4)
    assert (jobs["2"].limit, jobs["2"].task) == (None, None)
    assert jobs["2"].command == "/runs/with\na line break ^ and more/job/job.sh"
    assert (jobs["11"].dependency, jobs["11"].command) == ("afterok:10(failed)", None)


def test_reasons_say_what_to_do() -> None:
    jobs = {job.job_id: job for job in parse_squeue(QUEUE)}
    assert is_waiting(jobs["3_2"])
    assert not is_held(jobs["3_2"])
    assert "as many tasks" in explain_wait(jobs["3_2"])
    assert is_held(jobs["3_3"])
    assert "scontrol release 3_3" in explain_wait(jobs["3_3"])
    assert explain_wait(jobs["15"]).startswith("nodes it could have are down")
    assert has_ended(jobs["11"])
    assert explain_end(jobs["11"]) == "it was cancelled because a job before it failed"


def test_a_reason_nobody_knows_is_shown_as_it_is() -> None:
    (job,) = parse_squeue("\x1f".join(("7", "7", "N/A", "PENDING", "FullMoon", *["N/A"] * 5, "(null)", "/job.sh")))
    assert explain_wait(job) == "SLURM's reason: FullMoon"


def test_a_wrapper_around_squeue_is_named() -> None:
    with pytest.raises(InputError, match="is squeue a wrapper here"):
        parse_squeue("7\x1fPENDING\n")


def test_scontrol_tells_tasks_apart_and_is_not_fooled_by_names() -> None:
    jobs = {job.job_id: job for job in parse_scontrol(RECORDS)}
    assert list(jobs) == ["3_2", "3_3", "3_1"]
    assert (jobs["3_3"].state, jobs["3_3"].reason, jobs["3_3"].nodes) == ("PENDING", "JobArrayTaskLimit", "")
    assert (jobs["3_1"].state, jobs["3_1"].nodes, jobs["3_1"].elapsed) == ("RUNNING", "node[1-2]", 2)
    assert jobs["3_1"].command == "/runs/a b/job/job.sh"


def test_sacct_tells_how_jobs_ended() -> None:
    cancelled, waiting, failed = parse_sacct(ACCOUNTS)
    assert (cancelled.state, cancelled.elapsed, cancelled.command) == ("CANCELLED", 5, None)
    assert (waiting.state, waiting.start, waiting.nodes) == ("PENDING", None, "")
    assert (failed.job_id, failed.base, failed.task) == ("1_1", "1", 1)
    assert failed.submitted is not None
    assert time.localtime(failed.submitted)[:6] == (2026, 12, 1, 4, 29, 40)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:05", 5), ("12:00", 720), ("1:00:00", 3600), ("3-04:00:01", 273601), ("UNLIMITED", None), ("N/A", None)],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds
