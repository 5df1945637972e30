"""Artifacts assembled from ranks' files load in PEFT and transformers, unmodified and offline, and compute what their parts compute."""
import json
import os
import pathlib
import subprocess

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch = pytest.importorskip('torch')
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).resolve().parents[3]
PROBE = ROOT / 'build/tests/artifacts_assemble_probe'
TARGETS = ['q_proj', 'v_proj', 'down_proj']
LAYERS = 3


def make_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocab = {'<unk>': 0, '<s>': 1, '</s>': 2, **{chr(97 + i): 3 + i for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token='<unk>', bos_token='<s>', eos_token='</s>').save_pretrained(folder)


@pytest.fixture(scope='module', params=['tied', 'untied'])
def made(request, tmp_path_factory):
    """Base, adapter, what the ranks of a two-stage pipeline would write, and what the coordinator makes of it."""
    if not PROBE.exists():
        pytest.skip(f'{PROBE} is not built')
    torch.manual_seed(3)
    tied = request.param == 'tied'
    dir = tmp_path_factory.mktemp(request.param)
    base = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, vocab_size=40,
                                        max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2))
    base.save_pretrained(dir / 'root/base')
    make_tokenizer(dir / 'root/base')
    reference = base.state_dict()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, lora_dropout=0.0, task_type='CAUSAL_LM'))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if 'lora_' in name:
                tensor.normal_(0, 0.1)
    state = {name.replace('.default', ''): tensor.detach().clone() for name, tensor in model.state_dict().items() if 'lora_' in name}
    files = []

    def write(kind, rank, tensors, metadata=None):
        path = dir / f'{kind}-{rank}.safetensors'
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
        files.append(f'{kind}:{path}')

    parts = [{n: t for n, t in state.items() if ('layers.0.' in n) == (rank == 0)} for rank in range(2)]
    for rank, part in enumerate(parts):
        write('adapter', rank, part)
        write('checkpoint', rank, {f'{prefix}{n}': t for n, t in part.items() for prefix in ('', 'exp_avg.', 'exp_avg_sq.')})
    ids = torch.randint(3, 29, (2, 20))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        merged = {n: t.detach().clone() for n, t in model.merge_and_unload().state_dict().items()}
    if tied:
        merged.pop('lm_head.weight')
    first = {n: t for n, t in merged.items() if 'embed_tokens' in n or 'layers.0.' in n}
    last = {n: t for n, t in merged.items() if n not in first}
    if tied:  # the last stage holds the embedding as its head
        last['model.embed_tokens.weight'] = merged['model.embed_tokens.weight'].clone()
    write('merged', 0, first, {'format': 'pt'})
    write('merged', 1, last)  # without metadata: written anew
    for out in ('out', 'again'):
        run = subprocess.run([PROBE, dir / f'data-{out}', dir / 'root/base', dir / out, '4', '6', '0', ','.join(TARGETS), *files], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
    return dir, state, ids, logits, tied


def test_adapter_in_peft(made):
    dir, state, ids, logits, _ = made
    got = load_file(dir / 'out/adapter/adapter_model.safetensors')
    assert list(got) == sorted(state) and all(torch.equal(got[n], state[n]) for n in state)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dir / 'root/base', dtype=torch.float32), dir / 'out/adapter')
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, logits, atol=1e-5)
    config = json.loads((dir / 'out/adapter/adapter_config.json').read_text())
    assert config['lora_alpha'] == 6 and isinstance(config['lora_alpha'], int) and config['target_modules'] == TARGETS


def test_checkpoint_is_the_same_adapter(made):
    dir = made[0]
    assert (dir / 'out/checkpoint/adapter_model.safetensors').read_bytes() == (dir / 'out/adapter/adapter_model.safetensors').read_bytes()
    state = json.loads((dir / 'out/checkpoint/trainer_state.json').read_text())
    assert state['global_step'] == 1 and [row['step'] for row in state['log_history']] == [0, 1]


def test_merged_in_transformers(made):
    dir, _, ids, logits, tied = made
    model, info = AutoModelForCausalLM.from_pretrained(dir / 'out/merged', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and model.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, logits, atol=1e-5)
    index = json.loads((dir / 'out/merged/model.safetensors.index.json').read_text())['weight_map']
    held = {}
    for path in sorted((dir / 'out/merged').glob('*.safetensors')):
        with safe_open(path, 'pt') as file:
            assert file.metadata()['format'] == 'pt'
            for name in file.keys():
                assert name not in held, f'{name} is in two shards'
                held[name] = path.name
    assert held == index and len(held) == LAYERS * 9 + (2 if tied else 3)


def test_tokenizer_card_and_state(made):
    dir = made[0]
    for kind in ('adapter', 'merged'):
        assert AutoTokenizer.from_pretrained(dir / 'out' / kind)('a b').input_ids == AutoTokenizer.from_pretrained(dir / 'root/base')('a b').input_ids
        assert 'base_model: "base"' in (dir / 'out' / kind / 'README.md').read_text()
        state = json.loads((dir / 'out' / kind / 'trainer_state.json').read_text())
        assert state['best_metric'] == 0.3 and state['best_global_step'] == 2 and state['max_steps'] == 2
        assert state['log_history'] == [{'step': 0, 'epoch': 0.0, 'eval_loss': 2.0 / 3}, {'step': 1, 'epoch': 0.1, 'loss': 1 / 3, 'learning_rate': 1e-4, 'grad_norm': 0.1 + 0.2},
                                        {'step': 2, 'epoch': 0.2, 'loss': 0.25, 'learning_rate': 5e-5, 'grad_norm': 0.1 + 0.2}, {'step': 2, 'epoch': 0.2, 'eval_loss': 0.3}]
    from transformers import TrainerState
    assert TrainerState.load_from_json(dir / 'out/adapter/trainer_state.json').global_step == 2


def test_bytes_are_the_same_every_time(made):
    dir = made[0]
    for path in sorted((dir / 'out').rglob('*')):
        if path.is_file():
            assert path.read_bytes() == (dir / 'again' / path.relative_to(dir / 'out')).read_bytes(), path


def test_damaged_parts_are_found(made, tmp_path):
    dir, state, _, _, _ = made

    def run(tensors):
        save_file(tensors, tmp_path / 'adapter.safetensors')
        return subprocess.run([PROBE, tmp_path / f'data-{len(list(tmp_path.iterdir()))}', dir / 'root/base', tmp_path / 'out', '4', '6', '0', ','.join(TARGETS),
                               f'adapter:{tmp_path / "adapter.safetensors"}'], cwd=ROOT, capture_output=True, text=True, timeout=600)
    name = sorted(state)[0]
    missing = run({n: t for n, t in state.items() if n != name})
    assert missing.returncode == 1 and f'no rank wrote {name}' in missing.stderr
    bad = {n: t.clone() for n, t in state.items()}
    bad[name][0, 0] = float('nan')
    diverged = run(bad)
    assert diverged.returncode == 1 and name in diverged.stderr and 'learning_rate' in diverged.stderr
    assert not (tmp_path / 'out').exists()
