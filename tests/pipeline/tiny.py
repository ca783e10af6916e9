"""The whole way from teacher to student with models of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

STAGES = ("teacher", "teacher-dev", "targets", "student", "student-dev", "compare")

_TRAIN = (
    "data_dir: {corpus}, width: 0.02, rnn_size: 12, rnn_layers: 1, trackers: [], train_wer_clips: 0, epochs: 2, "
    "warmup_epochs: 0, learning_rate: 3e-3"
)


def write_tiny(path: Path, corpus: Path, out: Path, *, teacher: str = "", evaluation: str = "") -> Path:
    """Write the pipeline; `teacher` is added to the teacher's arguments, `evaluation` to those of its evaluation."""
    train = _TRAIN.replace("{corpus}", str(corpus))
    path.write_text(
        f"""\
output_dir: {out}
stages:
  - name: teacher
    command: train
    arguments: {{{train}{teacher}}}
  - name: teacher-dev
    command: evaluate
    arguments: {{checkpoint: "{{teacher.run}}", split: dev, beam_width: 1{evaluation}}}
  - name: targets
    command: extract
    after: teacher
    arguments: {{checkpoint: "{{teacher.run}}", split: train}}
  - name: student
    command: train
    after: targets
    arguments: {{{train}, model: student, soft_targets: "{{targets.output}}"}}
  - name: student-dev
    command: evaluate
    arguments: {{checkpoint: "{{student.run}}", split: dev, beam_width: 1}}
  - name: compare
    command: compare
    after: [teacher-dev, student-dev]
    arguments: ["{{teacher.run}}", "{{student.run}}", --split, dev, --no-measure]
"""
    )
    return path
