"""Whole runs of ppft-trainer against PEFT, against other layouts, and against themselves after a crash."""
import numpy, pytest

from trainer_run import *

STEPS = 40


def relative(a, b):
    assert len(a) == len(b)
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


@pytest.fixture(scope='module', autouse=True)
def model():
    ensure_model()


@pytest.fixture(scope='module')
def adapter(tmp_path_factory):
    return start_adapter(tmp_path_factory.mktemp('start') / 'adapter')


@pytest.fixture(scope='module')
def start(tmp_path_factory, adapter):
    return make_start(tmp_path_factory.mktemp('job'), documents(150), STEPS, eval_rows=documents(13, seed=500), adapter=adapter)


@pytest.fixture(scope='module')
def reference(start, adapter):
    return peft_run(adapter, documents(150), start)


@pytest.fixture(scope='module')
def calm(start, tmp_path_factory):
    """The undisturbed run over two stages."""
    return Run(start, tmp_path_factory.mktemp('calm'), pp=2)


@pytest.mark.parametrize('pp,schedule,virtual', [(1, 'gpipe', 1), (1, 'interleaved_1f1b', 2), (2, '1f1b', 1), (2, 'gpipe', 1), (2, 'interleaved_1f1b', 2), (4, '1f1b', 1), (4, 'gpipe', 1), (5, '1f1b', 1)])
def test_the_same_curve_as_peft_in_every_layout(start, reference, tmp_path, pp, schedule, virtual):
    losses, norms, model = reference
    run = Run(start, tmp_path, pp=pp, schedule=schedule, virtual=virtual)
    assert relative(run.losses(), losses) < 1e-4
    assert relative([r['grad_norm'] for r in run.rows()], norms) < 1e-3
    theirs = {name.replace('.default', ''): p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}
    ours = run.tensors()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert numpy.abs(tensor - theirs[name]).max() < 2e-3, name
    merged = run.tensors('merged_files')
    assert set(merged) == {name for name in base_model().state_dict() if name != 'lm_head.weight'}


def test_verifications_name_small_differences(calm):
    found = [(rank, v) for rank, exported in calm.of('exported') for v in exported['verifications']]
    assert [(rank, v['type']) for rank, v in found] == [(1, 'adapter'), (1, 'merged')]
    assert found[0][1]['max_relative_difference'] == 0
    assert 0 < found[1][1]['max_relative_difference'] < 1e-4


def test_last_logits_are_those_of_peft(calm, adapter, tmp_path):
    import json, torch
    from peft import PeftModel
    from safetensors.numpy import save_file
    save_file(calm.tensors(), tmp_path / 'adapter_model.safetensors')
    (tmp_path / 'adapter_config.json').write_text((adapter / 'adapter_config.json').read_text())
    model = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    verification = calm.of('exported')[-1][1]['verifications'] or calm.of('exported')[0][1]['verifications']
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([verification[0]['probe_ids']])).logits[0, -1].numpy()
    ours = numpy.array(verification[0]['last_logits'])
    ids = verification[0]['logit_ids']
    assert ids == sorted(set(ids)) and set(numpy.argsort(theirs)[-8:]) <= set(ids)
    assert numpy.abs(ours - theirs[ids]).max() / numpy.abs(theirs).max() < 1e-4


def test_two_runs_give_the_same_bytes(start, calm, tmp_path):
    again = Run(start, tmp_path, pp=2)
    assert again.losses() == calm.losses()
    assert again.evals() == calm.evals()
    assert again.digest() == calm.digest()


@pytest.mark.parametrize('step', [10, 30, 40])
def test_a_resumed_run_goes_on_to_the_same_bytes(start, calm, tmp_path, step):
    best = calm.checkpoint(step)[0]['state']['best_step']
    run = Run(resumed(start, calm, step, int(best)), tmp_path, pp=2)
    assert run.losses() == calm.losses()[step:]
    assert run.evals() == [e for e in calm.evals() if e[0] > step]
    assert run.digest() == calm.digest()


def test_another_layout_reads_the_checkpoint(start, calm, tmp_path):
    best = calm.checkpoint(20)[0]['state']['best_step']
    run = Run(resumed(start, calm, 20, int(best)), tmp_path, pp=4)
    assert relative(run.losses(), calm.losses()[20:]) < 1e-4


@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_rank_ends_the_others_with_its_name(start, calm, tmp_path, rank):
    run = Run(start, tmp_path / 'killed', pp=2, kill=(rank, 25), ok=False)
    other = 1 - rank
    assert run.exits[rank] == -9 and run.exits[other] == 1
    failures = run.of('failure')
    assert [r for r, _ in failures] == [other]
    assert failures[0][1]['reason']['code'] == 'COMM_ERROR' and failures[0][1]['peer'] == rank
    newest = max(int(c['state']['step']) for _, c in run.of('checkpoint'))
    assert newest >= 20
    best = run.checkpoint(newest)[0]['state']['best_step']
    again = Run(resumed(start, run, newest, int(best)), tmp_path / 'again', pp=2)
    assert run.losses()[:newest] + again.losses() == calm.losses()
    assert again.digest() == calm.digest()


def test_evaluation_is_the_mean_over_all_targets(start, calm, reference):
    import torch
    total = count = 0
    with torch.no_grad():
        for ids, mask in documents(13, seed=500):
            logits = reference[2].eval()(input_ids=torch.tensor([ids])).logits[0, :-1]
            labels = torch.tensor([i if m else -100 for i, m in zip(ids, mask)][1:])
            total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction='sum').item()
            count += sum(mask[1:])
    assert [step for step, _ in calm.evals()] == [0, 10, 20, 30, 40]
    assert abs(calm.evals()[-1][1] - total / count) / (total / count) < 1e-3


def test_the_best_is_exported_and_patience_ends_the_run(tmp_path, adapter):
    """A rate that is far too high after the first steps: the loss on held-out rows turns up, and the best is an early step."""
    start = make_start(tmp_path / 'job', documents(150), 60, eval_rows=documents(13, seed=500), adapter=adapter,
                       training={'learning_rate': 0.2, 'lr_scheduler': 'constant', 'warmup_steps': '30'}, evaluation={'eval_steps': '2', 'early_stopping_patience': 2}, checkpoint={'save_steps': '0'})
    run = Run(start, tmp_path / 'run', pp=2)
    evals = [e for e in run.evals() if e[0] > 0]
    best_step = min(evals, key=lambda e: e[1])[0]
    finished = run.of('finished')[0][1]
    assert finished['reason'] == 'early_stopping'
    assert int(finished['state']['best_step']) == best_step == evals[-1][0] - 4
    assert {int(e['step']) for _, e in run.of('exported')} == {best_step}
    from safetensors.numpy import load_file
    at_best = {name: t for f in run.checkpoint(best_step)[1] for name, t in load_file(f['path']).items() if not name.startswith('exp_avg')}
    ours = run.tensors()
    assert all((ours[name] == at_best[name]).all() for name in ours) and set(ours) == set(at_best)
    written = sorted({int(c['state']['step']) for _, c in run.of('checkpoint')})
    assert written[-1] == evals[-1][0] and best_step in written


def test_packing_with_dropout_is_the_same_in_every_layout(tmp_path):
    start = make_start(tmp_path / 'job', documents(150), 12, data={'sample_packing': True, 'shuffle': True}, training={'gradient_accumulation_steps': 4}, plan={'num_microbatches': 4})
    start['spec']['adapter']['lora_dropout'] = 0.2
    one, two, four = (Run(start, tmp_path / f'pp{pp}', pp=pp) for pp in (1, 2, 4))
    # To the bit: a cut moves where things are computed, not how.
    for run in (two, four):
        assert run.losses() == one.losses()
        assert [r['grad_norm'] for r in run.rows()] == [r['grad_norm'] for r in one.rows()]
        assert all((run.tensors()[name] == tensor).all() for name, tensor in one.tensors().items())
    start['spec']['seed'] = '2'
    assert Run(start, tmp_path / 'other', pp=1).losses() != one.losses()


@pytest.mark.parametrize('packing', [False, True])
def test_merged_micro_batches_are_the_same_training(tmp_path, adapter, packing):
    """The tenth step is the epoch's last and holds less than the others: passes with empty micro-batches and without any token."""
    start = make_start(tmp_path / 'job', documents(150), 12, eval_rows=documents(13, seed=500), adapter=adapter, data={'sample_packing': packing, 'shuffle': True},
                       training={'micro_batch_size': 1, 'gradient_accumulation_steps': 8 if packing else 16}, plan={'num_microbatches': 8 if packing else 16})
    start['spec']['adapter']['lora_dropout'] = 0.2

    def at(per_pass, **more):
        return {**start, **more, 'plan': {**start['plan'], 'microbatches_per_pass': per_pass, **more.get('plan', {})}}
    apart = Run(at(1), tmp_path / '1')
    for per_pass in (3, 8):
        run = Run(at(per_pass), tmp_path / str(per_pass))
        assert relative(run.losses()[:1], apart.losses()[:1]) < 1e-6 and relative(run.losses(), apart.losses()) < 1e-5
        norms = [[r['grad_norm'] for r in each.rows()] for each in (run, apart)]
        assert relative(norms[0][:1], norms[1][:1]) < 2e-6 and relative(*norms) < 1e-4
        assert relative([e for _, e in run.evals()], [e for _, e in apart.evals()]) < 1e-5
        for name, tensor in apart.tensors().items():
            assert numpy.abs(run.tensors()[name] - tensor).max() < 1e-3 * numpy.abs(tensor).max(), name
        for count in ('tokens_seen', 'supervised_tokens'):
            assert [r[count] for _, r in run.of('step')] == [r[count] for _, r in apart.of('step')]
        assert [r['epoch'] for r in run.rows()] == [r['epoch'] for r in apart.rows()]
    # The place in the data does not depend on it: a checkpoint goes on unmerged, and the other way round.
    best = int(run.checkpoint(10)[0]['state']['best_step'])
    for per_pass, source in ((1, run), (3, apart)):
        again = Run(resumed(at(per_pass), source, 10, best), tmp_path / f'again{per_pass}')
        assert relative(again.losses(), apart.losses()[10:]) < 1e-5
    if not packing:  # each replica merges its own
        two = Run(at(3, plan={'num_microbatches': 8, 'zero_stage': 3}), tmp_path / 'two', dp=2)
        assert relative(two.losses(), apart.losses()) < 1e-5 and relative([e for _, e in two.evals()], [e for _, e in apart.evals()]) < 1e-5


def held(run):
    """Bytes by kind of tensor, of each rank in order."""
    import re
    pattern = re.compile(r'holds (\d+) bytes of weights, (\d+) of masters, (\d+) of gradients, (\d+) of moments')
    found = {rank: [int(n) for n in m.groups()] for rank, line in run.of('log') if (m := pattern.search(line['text']))}
    return [dict(zip(('weights', 'masters', 'gradients', 'moments'), found[rank])) for rank in sorted(found)]


@pytest.mark.parametrize('dp,pp,zero', [(2, 1, 0), (2, 1, 1), (2, 1, 3), (2, 2, 1), (2, 2, 2), (2, 2, 3), (3, 1, 3), (4, 1, 2)])
def test_replicas_give_the_same_curve(start, calm, tmp_path, dp, pp, zero):
    if dp == 3:
        start, calm = {**start, 'plan': {**start['plan'], 'num_microbatches': 9}}, None
        calm = Run(start, tmp_path / 'calm', pp=pp)
    start = {**start, 'plan': {**start['plan'], 'zero_stage': zero, 'num_microbatches': start['plan']['num_microbatches'] // dp}}
    run = Run(start, tmp_path / 'run', pp=pp, dp=dp)
    assert relative(run.losses(), calm.losses()) < 1e-4
    assert relative([e for _, e in run.evals()], [e for _, e in calm.evals()]) < 1e-4
    best = run.checkpoint(20)[0]['state']['best_step']
    again = Run(resumed(start, run, 20, int(best)), tmp_path / 'again', pp=pp, dp=dp)
    assert again.losses() == run.losses()[20:] and again.digest() == run.digest()


def test_each_zero_stage_holds_less(start, tmp_path):
    start = {**start, 'spec': {**start['spec'], 'output': {'formats': ['adapter', 'merged'], 'verify': True}}}
    ranks = {}
    for zero in range(4):
        plan = {**start['plan'], 'zero_stage': zero, 'num_microbatches': 4, 'total_steps': '2'}
        ranks[zero] = held(Run({**start, 'plan': plan}, tmp_path / f'zero{zero}', dp=2))
        assert len(ranks[zero]) == 2
    whole = ranks[0][0]['masters']
    for zero, both in ranks.items():
        assert sum(rank['moments'] for rank in both) == (4 * whole if zero == 0 else 2 * whole)
        for rank in both:
            assert rank['masters'] == whole
            # Half of the sums and the gradients of two of the five layers.
            assert rank['gradients'] == (whole if zero < 2 else whole // 2 + 2 * whole // 5)
            assert (rank['weights'] == ranks[0][0]['weights']) == (zero < 3)
    assert ranks[3][0]['weights'] < ranks[0][0]['weights']


@pytest.mark.parametrize('dp,pp,zero,to', [(2, 2, 3, (1, 1, 0)), (1, 1, 0, (2, 2, 3)), (2, 1, 1, (4, 1, 2)), (4, 1, 2, (2, 2, 0))])
def test_a_checkpoint_moves_to_another_mesh(start, calm, tmp_path, dp, pp, zero, to):
    def at(layout, **more):
        return {**start, **more, 'plan': {**start['plan'], 'zero_stage': layout[2], 'num_microbatches': 8 // layout[0]}}
    run = Run(at((dp, pp, zero)), tmp_path / 'run', pp=pp, dp=dp, kill=(0, 25), ok=False)
    best = run.checkpoint(20)[0]['state']['best_step']
    again = Run(resumed(at(to), run, 20, int(best)), tmp_path / 'again', pp=to[1], dp=to[0])
    assert relative(run.losses()[:20] + again.losses(), calm.losses()) < 1e-4
    assert relative([e for _, e in again.evals()], [e for step, e in calm.evals() if step > 20]) < 1e-4


LAYOUTS = [dict(dp=1, pp=4, zero=0, schedule='gpipe'), dict(dp=2, pp=2, zero=3, schedule='1f1b'), dict(dp=1, pp=2, zero=0, schedule='interleaved_1f1b', virtual=2),
           dict(dp=4, pp=1, zero=2, schedule='gpipe'), dict(dp=2, pp=2, zero=1, schedule='gpipe'), dict(dp=1, pp=5, zero=0, schedule='1f1b'), dict(dp=2, pp=1, zero=0, schedule='interleaved_1f1b', virtual=2),
           dict(dp=1, pp=1, zero=0, schedule='1f1b')]


def test_one_run_moves_through_every_kind_of_layout(start, calm, tmp_path):
    """Cut off after every fifth step and taken up by other replicas, stages, ZeRO and schedule: the curve is the undisturbed one."""
    start = {**start, 'spec': {**start['spec'], 'checkpoint': {**start['spec']['checkpoint'], 'save_steps': '5'}}}
    losses, evals, kept, done = [], [], {}, 0
    for number, layout in enumerate(LAYOUTS):
        layout = dict(layout)
        here = {**start, 'plan': {**start['plan'], 'zero_stage': layout.pop('zero'), 'num_microbatches': 8 // layout['dp']}}
        if done:
            here['resume'], here['resume_files'] = kept[done]
            if (best := int(here['resume']['state']['best_step'])) in kept:
                here['best'], here['best_files'] = kept[best]
        last = number == len(LAYOUTS) - 1
        run = Run(here, tmp_path / str(number), kill=None if last else (0, done + 7), ok=last, **layout)
        done += 5
        kept[done] = run.checkpoint(done)
        losses += run.losses() if last else [row['loss'] for row in run.rows() if int(row['step']) <= done]
        evals += [e for e in run.evals() if last or e[0] <= done]
    assert relative(losses, calm.losses()) < 1e-4
    assert [step for step, _ in evals] == [step for step, _ in calm.evals()]
    assert relative([e for _, e in evals], [e for _, e in calm.evals()]) < 1e-4


@pytest.mark.parametrize('mode', ['selective', 'full'])
def test_activation_checkpointing_changes_no_byte(start, calm, tmp_path, mode):
    run = Run({**start, 'spec': {**start['spec'], 'parallel': {'activation_checkpointing': mode}}}, tmp_path, pp=2)
    assert run.losses() == calm.losses() and run.digest() == calm.digest()


def test_fp16_skips_overflows_and_comes_down(start, calm, tmp_path):
    start = {**start, 'plan': {**start['plan'], 'compute': 'fp16'}, 'spec': {**start['spec'], 'precision': {**start['spec']['precision'], 'initial_scale_power': 32, 'hysteresis': 1}}}
    run = Run(start, tmp_path, pp=2)
    last = run.of('step')[-1][1]
    skipped = int(last['skipped_steps'])
    assert skipped >= 4 and last['row']['loss_scale'] == 2.0 ** (32 - skipped)
    flags = [r['skipped'] for r in run.rows()]
    assert flags[:4] == [True] * 4 and sum(flags) == skipped
    told = [s for _, r in run.of('step') for s in r.get('skipped', [])]
    assert [int(s['step']) for s in told] == [int(r['step']) for r in run.rows() if r['skipped']]
    assert [s['loss_scale'] for s in told] == [2.0 ** (32 - i) for i in range(skipped)] and all(s['next_loss_scale'] == s['loss_scale'] / 2 for s in told)
    assert all('is not finite' in s['reason'] and 'stage' in s['reason'] for s in told)
    # The schedule waits with them: the first update has the first rate, whenever it comes.
    rates = [r['learning_rate'] for r in calm.rows()]
    assert [r['learning_rate'] for r in run.rows()] == [rates[i - sum(flags[:i])] for i in range(STEPS)]
    # The scaler goes on from a checkpoint where it stood.
    again = Run(resumed(start, run, 10, int(run.checkpoint(10)[0]['state']['best_step'])), tmp_path / 'again', pp=2)
    assert again.losses() == run.losses()[10:] and [r['loss_scale'] for r in again.rows()] == [r['loss_scale'] for r in run.rows()][10:]
    assert [r['learning_rate'] for r in again.rows()] == [r['learning_rate'] for r in run.rows()][10:]
    assert run.losses()[-1] < run.losses()[0]


def test_divergence_is_named_and_nothing_is_written(tmp_path, adapter):
    start = make_start(tmp_path / 'job', documents(150), 20, adapter=adapter, training={'learning_rate': 1e30, 'lr_scheduler': 'constant', 'warmup_steps': '0', 'max_grad_norm': 0.0})
    run = Run(start, tmp_path / 'run', pp=2, ok=False)
    assert run.exits == [1, 1]
    codes = {f['reason']['code'] for _, f in run.of('failure')}
    assert codes == {'NUMERIC_DIVERGENCE'}, run.of('failure')
    assert 'stage' in run.of('failure')[0][1]['reason']['message']
    assert not run.of('checkpoint') and not run.of('exported')


def test_a_checkpoint_of_other_data_is_refused(start, calm, tmp_path):
    changed = resumed(start, calm, 10, 10)
    changed['train_tokens'] = local_file(write_tokens(tmp_path / 'other.safetensors', documents(140)))
    run = Run(changed, tmp_path / 'run', pp=2, ok=False)
    assert {f['reason']['code'] for _, f in run.of('failure')} == {'DATASET_INVALID'}, 'it says nothing against the file'
    assert 'other training data' in run.of('failure')[0][1]['reason']['message']


def test_a_merged_model_that_does_not_fit_its_type_says_nothing_against_a_checkpoint(adapter, tmp_path):
    from safetensors.numpy import load_file, save_file
    tensors = load_file(adapter / 'adapter_model.safetensors')
    wide = next(name for name in tensors if 'layers.0.mlp.down_proj.lora_B' in name)
    tensors[wide] = tensors[wide] * numpy.float32(1e8)  # merged: infinite in float16
    (tmp_path / 'wide').mkdir()
    (tmp_path / 'wide' / 'adapter_config.json').write_text((adapter / 'adapter_config.json').read_text())
    save_file(tensors, tmp_path / 'wide' / 'adapter_model.safetensors')
    start = make_start(tmp_path / 'job', documents(150), 1, adapter=tmp_path / 'wide', training={'learning_rate': 1e-6}, checkpoint={'save_steps': '1', 'load_best_model_at_end': False})
    run = Run({**start, 'merge_dtype': 'float16'}, tmp_path / 'run', pp=1, ok=False)
    assert run.of('checkpoint') and not run.of('exported')
    failures = [f for _, f in run.of('failure')]
    assert {f['reason']['code'] for f in failures} == {'EXPORT_MISMATCH'}, failures
    assert 'output.merge_dtype: float32' in failures[0]['reason']['remedy']


def test_an_adapter_of_another_r_is_refused(start, tmp_path):
    changed = {**start, 'spec': {**start['spec'], 'adapter': {**start['spec']['adapter'], 'r': 4}}}
    run = Run(changed, tmp_path / 'run', ok=False)
    failure = run.of('failure')[0][1]
    assert failure['reason']['code'] == 'MODEL_INVALID' and 'lora_A.weight has another shape' in failure['reason']['message']
