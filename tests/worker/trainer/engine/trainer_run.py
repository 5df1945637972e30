"""Runs of ppft-trainer through the harness, and the same run by transformers and PEFT. The model is stories260K where the test assets are (PPFT_ASSETS), else a random one of its shape."""
import hashlib, json, math, os, pathlib, subprocess, sys

import numpy, pytest

HARNESS = pathlib.Path('build/tests/trainer_harness').resolve()
ASSETS = pathlib.Path(os.environ.get('PPFT_ASSETS', '../shared/assets')).resolve()
MODEL = ASSETS / 'models/stories260K-hf'
if not MODEL.exists():
    MODEL = pathlib.Path('build/tests/small_model').resolve()
TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
PROMPTS = ['The dog', 'Once upon a time', 'A girl named Sue', 'The small cat', 'Ben', 'One rainy day', 'The blue door', 'A big box']
ENDINGS = [' ran to the lake and looked at the fish.', ' wanted to play with a ball.', ' was very sad and sat down.', ' found a key.',
           ' liked to sing songs in the garden all day long.', ' slept under the warm sun.', ' saw a red car and asked to ride in it.']



def ensure_model():
    """Made in a folder of its own first: another process may do the same."""
    if MODEL.exists():
        return
    sys.path.insert(0, str(pathlib.Path('tests').resolve()))
    from small_model import make_small_llama
    made = make_small_llama(MODEL.with_name(f'small_model.{os.getpid()}'))
    try:
        made.rename(MODEL)
    except OSError:
        assert MODEL.exists()


def file_ref(path):
    data = pathlib.Path(path).read_bytes()
    return {'name': pathlib.Path(path).name, 'sha256': hashlib.sha256(data).hexdigest(), 'size_bytes': str(len(data))}


def local_file(path):
    return {'path': str(path), 'content': file_ref(path)}


def documents(count, seed=0):
    """(ids, supervised) of each row."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    out = []
    for i in range(seed, seed + count):
        prompt, ending = PROMPTS[i % len(PROMPTS)], ENDINGS[(i * 3 + i // 8) % len(ENDINGS)]
        ids = tokenizer(prompt + ending)['input_ids']
        split = len(tokenizer(prompt)['input_ids'])
        out.append((ids + [tokenizer.eos_token_id], [0] * split + [1] * (len(ids) + 1 - split)))
    return out


def write_tokens(path, rows):
    from safetensors.numpy import save_file
    save_file({'ids': numpy.array([t for ids, _ in rows for t in ids], numpy.uint32), 'supervised': numpy.array([s for _, mask in rows for s in mask], numpy.uint8),
               'offsets': numpy.cumsum([0] + [len(ids) for ids, _ in rows]).astype(numpy.int64), 'rows': numpy.arange(1, len(rows) + 1, dtype=numpy.int64)}, path)
    return path


def base_tensors(folder):
    """One file of raw bytes per tensor of the model."""
    from safetensors import safe_open
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    with safe_open(MODEL / 'model.safetensors', 'np') as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            (folder / name).write_bytes(tensor.tobytes())
            out.append({'tensor': {'name': name, 'dtype': 'F32', 'shape': [str(n) for n in tensor.shape], 'content': file_ref(folder / name)}, 'path': str(folder / name)})
    return out


def start_adapter(folder):
    """A PEFT adapter whose B is not zero, so that every gradient is alive from the first step."""
    import torch
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(7)
    model = get_peft_model(base_model(), LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules='all-linear', task_type='CAUSAL_LM'))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if 'lora_B' in name:
                tensor.normal_(0, 0.02)
    model.save_pretrained(folder)
    return folder


def base_model():
    import torch
    torch.set_num_threads(1)  # the model is tiny: threads would only wait for each other
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def make_start(folder, rows, steps, eval_rows=None, adapter=None, **changes):
    """A Start as the harness takes it. `changes` go into the sections of the spec."""
    spec = {
        'seed': '1',
        'adapter': {'r': 8, 'lora_alpha': 16, 'lora_dropout': 0.0, 'target_modules': TARGETS},
        'data': {'sequence_len': 64, 'sample_packing': False, 'shuffle': False},
        'training': {'max_steps': str(steps), 'micro_batch_size': 2, 'gradient_accumulation_steps': 8, 'learning_rate': 0.005, 'lr_scheduler': 'cosine', 'warmup_steps': str(min(4, steps - 1)),
                     'adam_beta1': 0.9, 'adam_beta2': 0.999, 'adam_epsilon': 1e-8, 'weight_decay': 0.01, 'max_grad_norm': 1.0, 'logging_steps': '1'},
        'precision': {'initial_scale_power': 16, 'loss_scale_window': 1000, 'hysteresis': 2, 'min_loss_scale': 1},
        'evaluation': {'eval_steps': '10', 'eval_on_start': True},
        'checkpoint': {'save_steps': '10', 'load_best_model_at_end': True},
        'output': {'formats': ['adapter', 'merged'], 'verify': True},
        'limits': {'stall_timeout': '60s'},
    }
    plan = {'num_microbatches': 8, 'zero_stage': 0, 'compute': 'fp32', 'total_steps': str(steps), 'threads_per_rank': 1}
    for key, value in changes.items():
        target = plan if key == 'plan' else spec[key]
        target.update(value)
    folder.mkdir(parents=True, exist_ok=True)
    start = {'job_id': 'job-test0001', 'epoch': '3', 'spec': spec, 'plan': plan, 'tensors': base_tensors(folder / 'tensors'), 'listen_address': '127.0.0.1', 'merge_dtype': 'float32',
             'train_tokens': local_file(write_tokens(folder / 'train.safetensors', rows))}
    import base64
    start['model_config'] = base64.b64encode((MODEL / 'config.json').read_bytes()).decode()
    if eval_rows:
        start['eval_tokens'] = local_file(write_tokens(folder / 'eval.safetensors', eval_rows))
    if adapter:
        start['init_adapter'] = [local_file(adapter / name) for name in ('adapter_config.json', 'adapter_model.safetensors')]
    return start


class Run:
    """All reports of one run of a job, in order."""

    def __init__(self, start, directory, pp=1, dp=1, schedule='1f1b', virtual=1, kill=None, ok=True):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / 'start.json').write_text(json.dumps(start))
        kill_flags = ['--kill_rank', str(kill[0]), '--kill_at_step', str(kill[1])] if kill else []
        run = subprocess.run([HARNESS, directory / 'start.json', directory, '--pp', str(pp), '--dp', str(dp), '--schedule', schedule, '--virtual', str(virtual), *kill_flags],
                             capture_output=True, text=True, timeout=900, env={**os.environ, 'MKL_CBWR': 'COMPATIBLE', 'OMP_NUM_THREADS': '1'})
        lines = [json.loads(line) for line in run.stdout.splitlines()]
        assert lines and 'exits' in lines[-1], run.stderr[-2000:]
        self.exits, self.reports, self.stderr = lines[-1]['exits'], lines[:-1], run.stderr
        assert not ok or run.returncode == 0, f'exits {self.exits}\n{run.stderr[-3000:]}'

    def of(self, kind):
        return [(r['rank'], r['report'][kind]) for r in self.reports if kind in r['report']]

    def rows(self):
        return [r['row'] for _, r in self.of('step')]

    def losses(self):
        return [r['loss'] for r in self.rows()]

    def evals(self):
        return [(int(r['row']['step']), r['row']['eval_loss']) for _, r in self.of('eval')]

    def tensors(self, kind='adapter_files'):
        """name -> array of the exported files of all ranks."""
        from safetensors.numpy import load_file
        out = {}
        for _, exported in self.of('exported'):
            for file in exported[kind]:
                assert file_ref(file['path']) == {**file['content'], 'name': file_ref(file['path'])['name']}
                for name, tensor in load_file(file['path']).items():
                    assert name not in out, f'{name} is in two files'
                    out[name] = tensor
        return out

    def digest(self):
        return {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in self.tensors().items()}

    def checkpoint(self, step):
        """What a coordinator would hand to a resumed run."""
        found = [c for _, c in self.of('checkpoint') if int(c['state']['step']) == step]
        return {'state': found[0]['state'], 'files': [f['content'] for c in found for f in c['files']]}, [f for c in found for f in c['files']]


def resumed(start, run, step, best_step=None):
    start = dict(start)
    start['resume'], start['resume_files'] = run.checkpoint(step)
    if best_step is not None:
        start['best'], start['best_files'] = run.checkpoint(best_step)
    return start


def peft_run(adapter, rows, start):
    """Losses of every step and the model after them."""
    import torch
    from peft import PeftModel
    model = PeftModel.from_pretrained(base_model(), adapter, is_trainable=True)
    training = start['spec']['training']
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1.0, weight_decay=training['weight_decay'])
    per_step, total, warm = training['micro_batch_size'] * training['gradient_accumulation_steps'], int(training['max_steps']), int(training['warmup_steps'])
    at, losses, norms = 0, [], []
    for step in range(total):
        if at >= len(rows):
            at = 0
        batch, at = rows[at:at + per_step], at + per_step
        targets = sum(sum(mask[1:]) for _, mask in batch)
        optimizer.zero_grad()
        loss_sum = 0.0
        for ids, mask in batch:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            labels = torch.tensor([i if m else -100 for i, m in zip(ids, mask)][1:])
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction='sum') / targets
            loss.backward()
            loss_sum += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(params, training['max_grad_norm']).item())
        factor = step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        for group in optimizer.param_groups:
            group['lr'] = training['learning_rate'] * factor
        optimizer.step()
        losses.append(loss_sum)
    return losses, norms, model
