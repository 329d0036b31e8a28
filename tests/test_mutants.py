"""A sample of the mutants of our kernels is noticed (`make mutants` runs all of them)."""

from __future__ import annotations

import random

import emulated
import pytest

EACH = 4  # of every kernel


@pytest.mark.skipif(emulated.absent() is not None, reason=str(emulated.absent()))
def test_a_sample_is_noticed() -> None:
    from mutation import explanation, trials
    from mutation_subjects import SUBJECTS

    for subject in SUBJECTS:
        sample = random.Random(subject.kernel).sample(trials((subject,)), EACH)
        survived = [trial for trial in sample if trial.noticed() is None and explanation(trial) is None]
        assert not survived, survived
