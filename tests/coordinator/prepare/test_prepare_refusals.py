"""Bad input is one answer that names the place and the remedy; no file is left behind, and no row can make the child crash."""
import json
import os
import shutil
import subprocess

import pytest
from prepare_tool import ASSETS, BINARY, Prepare, asset

GOOD = b'{"prompt":"a","completion":"b"}\n'

DATASETS = {
    'empty file': (b'', ['bad.jsonl', 'the dataset is empty']),
    'only blank lines': (b'\n \n', ['the dataset is empty']),
    'broken JSON in row 3': (GOOD * 2 + b'{"prompt": \n' + GOOD, ['bad.jsonl: row 3', 'not valid JSON']),
    'missing field in row 2': (GOOD + b'{"prompt":"a"}\n', ['bad.jsonl: row 2: field completion is missing', 'field_map']),
    'misspelt field': (b'{"prompt":"a","complection":"b"}\n', ['row 1', 'did you mean "complection"?']),
    'wrong type in row 1': (b'{"prompt":["a"],"completion":"b"}\n', ['row 1: field prompt', 'a list']),
    'invalid UTF-8 in row 2': (GOOD + b'{"prompt":"\xff\xfe","completion":"b"}\n', ['row 2', 'UTF-8']),
    'no answer anywhere': (b'{"prompt":"a","completion":""}\n' * 4, ['row 1: field completion is empty']),
    'deep nesting': (b'{"prompt":' + b'[' * 100000 + b'\n', ['row 1', 'nested']),
    'answer longer than the sequence': (b'{"prompt":"a","completion":"' + b'b c ' * 100 + b'"}\n', ['row 1: field completion', 'sequence_len (64)']),
    'answer far longer than the sequence': (b'{"prompt":"a","completion":"' + b'b c ' * 100000 + b'"}\n', ['row 1: field completion', 'sequence_len (64)']),
    'bad row after ten thousand': (GOOD * 10000 + b'{}\n', ['row 10001']),
}


@pytest.fixture
def tool(tmp_path, own_tokenizer):
    return Prepare(tmp_path / 'work', own_tokenizer)


def refused(tool, answer, code, *words, leaves):
    assert answer['ok'] is False and answer['code'] == code, answer
    for word in words:
        assert word in answer['message'], answer
    assert tool.files() == sorted(leaves), 'nothing half done is left'


@pytest.mark.parametrize('what', DATASETS)
def test_datasets(tool, what):
    content, words = DATASETS[what]
    path = tool.write('bad.jsonl', content)
    refused(tool, tool.request([(path, 'prompt_completion')]), 'DATASET_INVALID', *words, leaves=['bad.jsonl', 'request.json'])
    good = tool.write('good.jsonl', GOOD)
    refused(tool, tool.request([(good, 'prompt_completion')], [(path, 'prompt_completion')]), 'DATASET_INVALID', *words, leaves=['bad.jsonl', 'good.jsonl', 'request.json'])
    assert tool.request([(good, 'prompt_completion')])['ok']


def test_a_row_without_any_target(tool):
    # One token that begins in the prompt, and no EOS: nothing is left to learn.
    path = tool.write('bad.jsonl', [{'prompt': ' t', 'completion': 'he'}])
    answer = tool.request([(path, 'prompt_completion')], train_on_eos='none')
    refused(tool, answer, 'DATASET_INVALID', 'row 1: field completion', 'no token of the row is supervised', leaves=['bad.jsonl', 'request.json'])


def test_summary_longer_than_the_sequence(tool):
    path = tool.write('bad.jsonl', [{'document': 'x', 'summary': 'ok'}, {'document': 'x', 'summary': 'the bird ' * 60}])
    refused(tool, tool.request([(path, 'summarization')]), 'DATASET_INVALID', 'bad.jsonl: row 2: field summary', 'with instruction_prefix', leaves=['bad.jsonl', 'request.json'])


@pytest.mark.parametrize('data, words', [
    ({'sequence_len': 4}, ['data.sequence_len']), ({'excess_length_strategy': 'cut'}, ['data.excess_length_strategy', 'truncate']),
    ({'train_on_eos': 'maybe'}, ['data.train_on_eos']), ({'val_set_size': 1.5}, ['data.val_set_size']), ({'sequence_length': 5}, ['data.sequence_length', 'unknown']),
    ({'train_on_inputs': 'yes'}, ['data.train_on_inputs'])], ids=str)
def test_requests(tool, data, words):
    path = tool.write('good.jsonl', GOOD)
    refused(tool, tool.request([(path, 'prompt_completion')], **data), 'SPEC_INVALID', *words, leaves=['good.jsonl', 'request.json'])


def test_one_row_cannot_be_held_out(tool):
    path = tool.write('one.jsonl', GOOD)
    refused(tool, tool.request([(path, 'prompt_completion')], val_set_size=0.5), 'DATASET_INVALID', 'val_set_size', leaves=['one.jsonl', 'request.json'])


def test_tokenizer_and_model_disagree(tool, own_tokenizer, tmp_path):
    path = tool.write('good.jsonl', GOOD)
    num_ids = tool.run('--check-tokenizer', own_tokenizer, '--vocab_size', 1000)['num_ids']
    assert tool.run('--check-tokenizer', own_tokenizer, '--vocab_size', num_ids)['ok']
    tool.vocab_size = num_ids - 1
    refused(tool, tool.request([(path, 'prompt_completion')]), 'TOKENIZER_MISMATCH', str(num_ids - 1), 'vocab_size', leaves=['good.jsonl', 'request.json'])

    def check(edit):
        folder = tmp_path / 'edited'
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(own_tokenizer, folder)
        edit(folder)
        answer = tool.run('--check-tokenizer', folder, '--vocab_size', num_ids)
        assert not answer['ok'] and str(folder) in answer['message']
        return answer
    assert check(lambda d: (d / 'tokenizer.json').unlink())['code'] == 'MODEL_INVALID'
    assert check(lambda d: (d / 'tokenizer.json').write_text('{'))['code'] == 'MODEL_INVALID'
    assert check(lambda d: (d / 'tokenizer_config.json').unlink())['code'] == 'TOKENIZER_MISMATCH'
    assert check(lambda d: (d / 'tokenizer_config.json').write_text('{"eos_token": "<stop>"}'))['code'] == 'TOKENIZER_MISMATCH'
    sparse = check(lambda d: (d / 'tokenizer.json').write_text((d / 'tokenizer.json').read_text().replace('"vocab": {', '"vocab": {"zzz_extra": 70000,')))
    assert sparse['code'] == 'TOKENIZER_MISMATCH' and 'zzz_extra' in sparse['message']


def test_a_sparse_vocabulary_of_a_real_model(tmp_path):
    folder = tmp_path / 'model'
    shutil.copytree(asset('models', 'stories260K-hf'), folder)
    text = (folder / 'tokenizer.json').read_text()
    (folder / 'tokenizer.json').chmod(0o600)  # the assets may be read-only
    (folder / 'tokenizer.json').write_text(text.replace('"vocab": {', '"vocab": {"zzz_extra": 70000, '))
    answer = Prepare(tmp_path / 'work', folder).run('--check-tokenizer', folder, '--vocab_size', 512)
    assert answer['code'] == 'TOKENIZER_MISMATCH' and '70000' in answer['message']


def test_tokenizer_model_alone(tmp_path):
    """SentencePiece's own file, without tokenizer.json."""
    tool = Prepare(tmp_path / 'work', asset('tokenizers', 'llama2_spm'), 32000)
    path = tool.write('rows.jsonl', [{'prompt': 'Hello wörld', 'completion': ' 日本 it is.'}])
    assert tool.request([(path, 'prompt_completion')])['ok']
    [(_, ids, mask)] = tool.tokens()
    assert ids[:2] == [1, 15043] and ids[-1] == 2
    tokens = tool.preview(1)['rows'][0]['tokens']
    assert ''.join(t['text'] for t in tokens) == 'Hello wörld 日本 it is.'
    assert ''.join(t['text'] for t in tokens if t['supervised']) == ' 日本 it is.'


@pytest.mark.parametrize('make', [lambda: b'{"prompt":"a","completion":"' + b'a' * (1 << 24) + b'"}', lambda: b'{"prompt":"a","completion":"b"' * 500000,
                                  lambda: b'"' * 100000, lambda: os.urandom(200000), lambda: b'[' + GOOD.strip() + b',' * 1000000 + b']', lambda: b'\x00' * 100000,
                                  lambda: b'{"prompt":"' + '\u0301'.encode() * 3000000 + b'","completion":"b"}'],
                         ids=['huge row', 'objects', 'quotes', 'noise', 'commas', 'nul', 'marks'])
def test_hostile_files_give_an_answer(tool, make):
    path = tool.write('bad.jsonl', make())
    for kind in ('prompt_completion', 'completion'):
        answer = tool.request([(path, kind)])
        assert answer['ok'] or 'bad.jsonl' in answer['message']


def test_naughty_strings(tool):
    naughty = [s for s in json.loads(asset('hostile', 'blns', 'blns.json').read_text(encoding='utf-8')) if s]
    path = tool.write('rows.jsonl', [{'text': s} for s in naughty])
    assert tool.request([(path, 'completion')])['train']['rows'] == len(naughty)


def test_a_row_of_sixteen_mebibytes_is_cut_within_memory(tool):
    path = tool.write('rows.jsonl', [{'document': 'the bird ran ' * 1200000, 'summary': 'A bird ran.'}])
    assert tool.request([(path, 'summarization')])['train']['truncated'] == 1
    assert 32 << 10 < tool.peak_kib() < 512 << 10


def test_a_full_disk_is_said_and_leaves_nothing(tool, tmp_path):
    if os.geteuid() != 0:
        pytest.skip('mounting a small tmpfs needs root')
    small = tmp_path / 'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', small], capture_output=True).returncode != 0:
        pytest.skip('mounting a small tmpfs is not permitted here')
    try:
        path = tool.write('rows.jsonl', [{'prompt': 'a', 'completion': f' the bird {i}'} for i in range(40000)])
        tool.request([(path, 'prompt_completion')])
        request = json.loads((tool.folder / 'request.json').read_text())
        request['output_train'] = str(small / 'train.safetensors')
        (tool.folder / 'request.json').write_text(json.dumps(request))
        answer = tool.run('--request', tool.folder / 'request.json')
        assert not answer['ok'] and answer['code'] == 'DISK_FULL' and list(small.iterdir()) == []
    finally:
        subprocess.run(['umount', small])


def test_usage_errors_exit_with_2():
    for args in ([], ['--request'], ['--preview', '3'], ['--request', 'x', '--preview', '0'], ['--check-tokenizer', '/tmp'], ['--what', 'x']):
        run = subprocess.run([BINARY, *args], capture_output=True)
        assert run.returncode == 2 and b'usage' in run.stderr and run.stdout == b''
