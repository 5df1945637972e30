"""AdamW and clipping against torch.optim.AdamW and clip_grad_norm_."""
import pathlib, subprocess

import numpy, pytest

RUN = pathlib.Path('build/tests/adamw_run').resolve()
SIZES = [[7, 13], [64, 3], [1], [33, 31]]


@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('lr,beta1,beta2,epsilon,decay,max_norm', [(2e-4, 0.9, 0.999, 1e-8, 0.0, 1.0), (5e-3, 0.9, 0.95, 1e-8, 0.01, 0.5), (0.1, 0.5, 0.9, 1e-3, 0.3, 0.0), (0.0, 0.9, 0.999, 1e-8, 0.1, 1.0)])
def test_adamw(shards, lr, beta1, beta2, epsilon, decay, max_norm):
    import torch
    steps = 60
    generator = torch.Generator().manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(*s, generator=generator)) for s in SIZES]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=epsilon, weight_decay=decay, foreach=False)
    data, expected = [p.detach().numpy().ravel().copy() for p in params], []
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * (0.1 if step % 3 else 30.0)
            data.append(p.grad.numpy().ravel().copy())
        if max_norm:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
        expected.append(numpy.concatenate([p.detach().numpy().ravel() for p in params]).copy())
    arguments = [str(x) for x in (shards, lr, beta1, beta2, epsilon, decay, max_norm, steps, *(numpy.prod(s) for s in SIZES))]
    run = subprocess.run([RUN, *arguments], input=numpy.concatenate(data).astype('<f4').tobytes(), capture_output=True)
    assert run.returncode == 0
    ours = numpy.frombuffer(run.stdout, '<f4').reshape(steps, -1)
    for step in range(steps):
        error = numpy.abs(ours[step] - expected[step]) / numpy.maximum(numpy.abs(expected[step]), 1e-2)
        assert error.max() < 1e-4, f'step {step + 1}, element {error.argmax()}: {error.max():.1e}'
