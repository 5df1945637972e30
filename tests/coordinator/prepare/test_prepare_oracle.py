"""Ids and supervision of every format equal what transformers' tokenizer gives under the written rule; truncation keeps its promises."""
import hashlib
import json
import random

import pytest
from prepare_tool import ASSETS, INSTRUCTION, RESPONSE, Prepare, asset
from transformers import AutoTokenizer

TOKENIZERS = {'own': None, 'stories260K': ('models', 'stories260K-hf'), 'llama3.2': ('tokenizers', 'hf_llama3_2'), 'qwen2.5': ('tokenizers', 'hf_qwen2_5'),
              'gpt2': ('tokenizers', 'hf_gpt2')}

TEXTS = ['The cat sat on the mat.', ' leading', '  two leading', 'trailing ', 'trailing  ', 'tab\tand\nnewline\r\n', '日本語のテキスト', 'e\u0301 combining', 'naïve café',
         '\u0301starts with a mark', '🙂👩‍👩‍👧‍👦 emoji', 'literal <s> and </s> inside', '</s>', '<|eot_id|>', '<|endoftext|>', 'a\u00a0b\u2003c', '\u200bzero', 'x' * 70, '12345 6789',
         "don't it's we'll", '{"json": [1, 2]}', '\x00nul', '  ', '\n\n', 'ﬁ ligature ①', 'العربية', 'ß', '한국어']


@pytest.fixture(scope='module', params=TOKENIZERS)
def tool(request, tmp_path_factory, own_tokenizer):
    """(Prepare, the tokenizer of transformers)"""
    folder = own_tokenizer if request.param == 'own' else asset(*TOKENIZERS[request.param])
    return Prepare(tmp_path_factory.mktemp('prepare'), folder), AutoTokenizer.from_pretrained(folder)


def expect(tokenizer, context, answer, everything=False, eos=True):
    """interfaces.md, "Row to tokens", in transformers' words."""
    enc = tokenizer(context + answer, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, spans = list(enc['input_ids']), enc['offset_mapping']
    plain = tokenizer(context + answer, add_special_tokens=False)['input_ids']
    num_added = len(ids) - len(plain)  # all in front
    assert ids[num_added:] == list(plain)
    mask = [int(i >= num_added if everything else (b > a and a >= len(context))) for i, (a, b) in enumerate(spans)]
    if ids[-1] != tokenizer.eos_token_id:
        ids, mask = ids + [tokenizer.eos_token_id], mask + [1]
    mask[-1] = int(eos and mask[-1])
    return ids, mask


def pairs():
    rng = random.Random(5)
    out = [(a, b) for a in TEXTS for b in rng.sample(TEXTS, 6)]
    blns = ASSETS / 'hostile/blns/blns.json'
    if blns.exists():
        naughty = [s for s in json.loads(blns.read_text(encoding='utf-8')) if s]
        out += list(zip(naughty, naughty[7:] + naughty[:7]))
    return out + [('', 'an answer without a prompt')]


def compare(tool, tokenizer, expected):
    got = tool.tokens()
    assert len(got) == len(expected)
    for (row, ids, mask), (context, answer, want) in zip(got, expected):
        assert (ids, mask) == want, (row, context, answer, tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize('options', [{}, {'train_on_inputs': True}, {'train_on_eos': 'none'}], ids=str)
def test_prompt_completion(tool, options):
    tool, tokenizer = tool
    expected = [(a, b, expect(tokenizer, a, b, options.get('train_on_inputs', False), options.get('train_on_eos') != 'none')) for a, b in pairs()]
    expected = [e for e in expected if any(e[2][1][1:])]  # a row without a target is refused, elsewhere
    path = tool.write('rows.jsonl', [{'prompt': a, 'completion': b} for a, b, _ in expected])
    answer = tool.request([(path, 'prompt_completion')], sequence_len=100000, **options)
    assert answer['ok'], answer
    compare(tool, tokenizer, expected)
    assert answer['train'] == {'rows': len(expected), 'tokens': sum(len(i) for _, _, (i, _) in expected), 'targets': sum(sum(m[1:]) for _, _, (_, m) in expected),
                               'truncated': 0, 'dropped': 0, 'max_length': max(len(i) for _, _, (i, _) in expected)}


def test_summarization(tool):
    tool, tokenizer = tool
    expected = [(a, b, expect(tokenizer, INSTRUCTION + a + RESPONSE, b)) for a, b in pairs()]
    path = tool.write('rows.jsonl', [{'dialogue': a, 'tldr': b} for a, b, _ in expected])
    assert tool.request([(path, 'summarization', {'document': 'dialogue', 'summary': 'tldr'})], sequence_len=100000)['ok']
    compare(tool, tokenizer, expected)


def test_empty_prefixes_are_kept_empty(tool):
    tool, tokenizer = tool
    path = tool.write('rows.jsonl', [{'document': 'A dog ran.', 'summary': ' A dog'}])
    for prefixes in ({'instruction_prefix': '', 'response_prefix': ''}, {'instruction_prefix': None, 'response_prefix': None}):
        assert tool.request([(path, 'summarization')], **prefixes)['ok']
        assert tool.tokens()[0][1:] == expect(tokenizer, 'A dog ran.', ' A dog')


def test_completion(tool):
    tool, tokenizer = tool
    expected = [('', b, expect(tokenizer, '', b, everything=True)) for _, b in pairs()]
    expected = [e for e in expected if any(e[2][1][1:])]
    path = tool.write('rows.jsonl', [{'text': b} for _, b, _ in expected])
    answer = tool.request([(path, 'completion')], sequence_len=100000)
    assert answer['ok'], answer
    compare(tool, tokenizer, expected)


def test_preview_shows_the_same(tool):
    tool, tokenizer = tool
    rows = [{'prompt': a, 'completion': b} for a, b in pairs()[:60] if any(expect(tokenizer, a, b)[1][1:])]
    path = tool.write('rows.jsonl', rows)
    assert tool.request([(path, 'prompt_completion')], sequence_len=100000)['ok']
    preview = tool.preview(len(rows))['rows']
    assert len(preview) == len(rows)
    for row, (number, ids, mask), shown in zip(rows, tool.tokens(), preview):
        assert shown['row'] == number and not shown['truncated'] and shown['source'] == 'rows.jsonl'
        assert [t['id'] for t in shown['tokens']] == ids and [int(t['supervised']) for t in shown['tokens']] == mask
        assert [t['piece'] for t in shown['tokens']] == tokenizer.convert_ids_to_tokens(ids)
        assert all('text' in t for t in shown['tokens'])
        text = ''.join(t['text'] for t in shown['tokens'])
        full = row['prompt'] + row['completion']
        assert text == full or full.startswith(text) and tokenizer(text)['input_ids'] == tokenizer(full)['input_ids']


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


STORY = ' '.join(f'Part {i}: the little bird number {i} saw a big tree, naïve é 日本 and went home.' for i in range(60))


@pytest.mark.parametrize('length', [40, 64, 100, 200])
def test_truncation_cuts_the_end_of_the_document(tool, length):
    tool, tokenizer = tool
    rows = [{'document': STORY[:n], 'summary': 'A bird goes home.'} for n in (10, 100, 300, 1000, len(STORY))]
    overhead = len(expect(tokenizer, INSTRUCTION + RESPONSE, rows[0]['summary'])[0])
    path = tool.write('rows.jsonl', rows)
    answer = tool.request([(path, 'summarization')], sequence_len=length)
    if overhead > length:
        assert not answer['ok'] and 'row 1: field summary' in answer['message']
        return
    assert answer['ok'], answer
    shown = tool.preview(len(rows))['rows']
    long_rows = 0
    for row, (number, ids, mask), seen in zip(rows, tool.tokens(), shown):
        whole = expect(tokenizer, INSTRUCTION + row['document'] + RESPONSE, row['summary'])
        assert len(ids) <= length
        if len(whole[0]) <= length:
            assert (ids, mask) == whole and not seen['truncated']
            continue
        long_rows += 1
        assert seen['truncated']
        assert len(ids) >= min(length, overhead + 12) - 8  # nearly full
        text = ''.join(t['text'] for t in seen['tokens'])
        assert text.startswith(INSTRUCTION) and text.endswith(RESPONSE + row['summary'])
        kept = text[len(INSTRUCTION):-len(RESPONSE + row['summary'])]
        assert row['document'].startswith(kept)
        assert (ids, mask) == expect(tokenizer, INSTRUCTION + kept + RESPONSE, row['summary'])
    assert answer['train']['truncated'] == long_rows > 0


def test_truncation_cuts_the_beginning_of_a_prompt(tool):
    tool, tokenizer = tool
    row = {'prompt': STORY, 'completion': ' The end.'}
    path = tool.write('rows.jsonl', [row])
    answer = tool.request([(path, 'prompt_completion')], sequence_len=50)
    assert answer['ok'] and answer['train']['truncated'] == 1
    [(_, ids, mask)] = tool.tokens()
    assert 40 <= len(ids) <= 50
    kept = ''.join(t['text'] for t in tool.preview(1)['rows'][0]['tokens'])[:-len(row['completion'])]
    assert STORY.endswith(kept) and (ids, mask) == expect(tokenizer, kept, row['completion'])


def test_truncation_of_a_completion_keeps_the_first_tokens_without_eos(tool):
    tool, tokenizer = tool
    path = tool.write('rows.jsonl', [{'text': STORY}])
    assert tool.request([(path, 'completion')], sequence_len=50)['ok']
    [(_, ids, mask)] = tool.tokens()
    whole = expect(tokenizer, '', STORY, everything=True)
    assert (ids, mask) == (whole[0][:50], whole[1][:50])


def test_drop_and_raise(tool):
    tool, tokenizer = tool
    rows = [{'prompt': 'The cat', 'completion': ' sat.'}, {'prompt': STORY, 'completion': ' The end.'}, {'prompt': 'Lily', 'completion': ' ran.'},
            {'prompt': STORY * 200, 'completion': ' The end.'}]
    path = tool.write('rows.jsonl', rows)
    answer = tool.request([(path, 'prompt_completion')], sequence_len=32, excess_length_strategy='drop')
    assert answer['ok'] and answer['train']['rows'] == 2 and answer['train']['dropped'] == 2
    assert [number for number, _, _ in tool.tokens()] == [1, 3]
    answer = tool.request([(path, 'prompt_completion')], sequence_len=32, excess_length_strategy='raise')
    assert not answer['ok'] and answer['code'] == 'DATASET_INVALID' and 'row 2' in answer['message'] and 'sequence_len (32)' in answer['message']
    path = tool.write('rows.jsonl', rows[1:2])
    answer = tool.request([(path, 'prompt_completion')], sequence_len=32, excess_length_strategy='drop')
    assert not answer['ok'] and 'empty' in answer['message'] and 'dropped' in answer['message']


def test_held_out_rows(tool):
    tool, _ = tool
    rows = [{'prompt': f'The cat {i}', 'completion': f' sat {i} times.'} for i in range(40)]
    path = tool.write('rows.jsonl', rows)
    request = dict(datasets=[(path, 'prompt_completion')], val_set_size=0.2)
    answer = tool.request(**request)
    assert answer['train']['rows'] == 32 and answer['eval']['rows'] == 8
    train, held = tool.tokens('train'), tool.tokens('eval')
    assert sorted(r for r, _, _ in train + held) == list(range(1, 41)) and [r for r, _, _ in train] == sorted(r for r, _, _ in train)

    def hashes():
        return [hashlib.sha256((tool.folder / f'{part}.safetensors').read_bytes()).hexdigest() for part in ('train', 'eval')]
    first = hashes()
    tool.request(**request, threads=1)
    assert hashes() == first, 'the same request gives the same bytes, whatever the threads'
    tool.request(**request, seed=2)
    assert hashes() != first
    assert tool.request([(path, 'prompt_completion')], val_set_size=0.001)['eval']['rows'] == 1
    assert tool.request([(path, 'prompt_completion')], val_set_size=0.999)['train']['rows'] == 1


def test_several_datasets_and_test_datasets(tool):
    tool, tokenizer = tool
    a = tool.write('a.jsonl', [{'prompt': 'The cat', 'completion': ' sat.'}])
    b = tool.write('b.json', json.dumps([{'text': 'Once upon a time'}, {'text': 'The end'}]).encode())
    c = tool.write('c.jsonl', [{'document': 'A dog ran.', 'summary': 'A dog'}])
    answer = tool.request([(a, 'prompt_completion'), (b, 'completion')], [(c, 'summarization')])
    assert answer['train']['rows'] == 3 and answer['eval']['rows'] == 1
    assert [ids for _, ids, _ in tool.tokens()] == [expect(tokenizer, 'The cat', ' sat.')[0], expect(tokenizer, '', 'Once upon a time')[0], expect(tokenizer, '', 'The end')[0]]
    assert [r for r, _, _ in tool.tokens()] == [1, 1, 2]
    assert tool.tokens('eval')[0][1] == expect(tokenizer, INSTRUCTION + 'A dog ran.' + RESPONSE, 'A dog')[0]


def test_a_long_file_keeps_its_order(tool):
    tool, tokenizer = tool
    path = tool.write('rows.jsonl', [{'prompt': f'{i}', 'completion': f' {i}'} for i in range(3000)])
    assert tool.request([(path, 'prompt_completion')], threads=3)['train']['rows'] == 3000
    for i, (number, ids, _) in enumerate(tool.tokens()):
        assert number == i + 1
        if i % 97 == 0:
            assert ids == expect(tokenizer, f'{i}', f' {i}')[0]
