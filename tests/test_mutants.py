"""Of a sample of the mutants of our kernels at least 95% are noticed; `make mutants` runs all."""

from __future__ import annotations

import random
import time

import emulated
import pytest

SECONDS = 60  # of this process, for the sample


@pytest.mark.skipif(emulated.absent() is not None, reason=str(emulated.absent()))
def test_a_sample_is_noticed() -> None:
    from mutation import explanation, trials
    from mutation_subjects import SUBJECTS

    started, queues, survived, count = time.process_time(), [], [], 0
    for subject in SUBJECTS:
        queue = trials((subject,))
        random.Random(subject.kernel).shuffle(queue)
        queues.append(queue)
    while any(queues) and time.process_time() - started < SECONDS:
        for queue in filter(None, queues):  # one of each kernel in turn
            if time.process_time() - started > SECONDS:
                break
            trial = queue.pop()
            count += 1
            if trial.noticed() is None and explanation(trial) is None:
                survived.append(str(trial))
    assert count > len(SUBJECTS)
    assert len(survived) <= 0.05 * count, survived
