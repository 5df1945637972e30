"""Every schedule against transformers' own, factor by factor."""
import pathlib, subprocess

import pytest

TABLE = pathlib.Path('build/tests/schedule_table').resolve()


def ours(name, warmup, total, floor=0.0, decay=0):
    run = subprocess.run([TABLE, name, str(warmup), str(total), repr(floor), str(decay)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [float(line) for line in run.stdout.split()]


def theirs(name, warmup, total, floor, decay):
    import torch
    from transformers import optimization as opt
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = {
        'constant': lambda: opt.get_constant_schedule_with_warmup(optimizer, warmup),
        'linear': lambda: opt.get_linear_schedule_with_warmup(optimizer, warmup, total),
        'cosine': lambda: opt.get_cosine_schedule_with_warmup(optimizer, warmup, total),
        'cosine_with_min_lr': lambda: opt.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, min_lr_rate=floor),
        'wsd': lambda: opt.get_wsd_schedule(optimizer, num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=total, min_lr_ratio=floor),
    }
    factor = make[name]().lr_lambdas[0]
    return [factor(step) for step in range(total + 1)]


@pytest.mark.parametrize('name', ['constant', 'linear', 'cosine', 'cosine_with_min_lr', 'wsd'])
@pytest.mark.parametrize('warmup,total,floor,decay', [(0, 1, 0.0, 1), (0, 10, 0.1, 3), (4, 40, 0.1, 4), (7, 200, 0.25, 61), (40, 40, 0.0, 0), (3, 20, 0.5, 17), (1, 2, 0.0, 1)])
def test_factor(name, warmup, total, floor, decay):
    a, b = ours(name, warmup, total, floor, decay), theirs(name, warmup, total, floor, decay)
    assert len(a) == len(b)
    for step, (x, y) in enumerate(zip(a, b), 1):
        assert abs(x - y) <= 1e-14, f'step {step}: {x} instead of {y}'


def test_unknown_name():
    assert subprocess.run([TABLE, 'cosin', '0', '1', '0', '0']).returncode == 1
