"""Runs ppft-prepare and reads its token files. Assets of other vendors are looked for in PPFT_ASSETS or ../shared/assets."""
import json
import os
import pathlib
import re
import subprocess
import time

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
from safetensors import safe_open

ROOT = pathlib.Path(__file__).resolve().parents[3]
BINARY = ROOT / 'build/bin/ppft-prepare'
INSTRUCTION = 'Summarize the following article:\n\n'
RESPONSE = '\n\nSummary:\n'
ASSETS = pathlib.Path(os.environ.get('PPFT_ASSETS', ROOT.parent / 'shared/assets'))


def asset(*parts):
    path = ASSETS.joinpath(*parts)
    if not path.exists():
        pytest.skip(f'{path} is not there (set PPFT_ASSETS)')
    return path


class Prepare:
    """One request after another in one folder; the keyword arguments of `request` are keys of the data section."""

    def __init__(self, folder, tokenizer_dir, vocab_size=1 << 20):
        self.folder, self.tokenizer_dir, self.vocab_size = folder, str(tokenizer_dir), vocab_size
        folder.mkdir(exist_ok=True)

    def write(self, name, content):
        path = self.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(''.join(json.dumps(row) + '\n' for row in content), encoding='utf-8')
        return path

    def request(self, datasets, test_datasets=(), seed=1, threads=2, **data):
        """datasets: (file, type) or (file, type, field_map)."""
        def entry(path, kind, field_map=None):
            return {'file': str(path), 'source': path.name, 'type': kind, 'field_map': field_map or {}}
        data = {'sequence_len': 64, 'instruction_prefix': INSTRUCTION, 'response_prefix': RESPONSE, **data}
        request = {'tokenizer_dir': self.tokenizer_dir, 'vocab_size': self.vocab_size, 'data': data, 'seed': seed, 'threads': threads,
                   'datasets': [entry(*d) for d in datasets], 'test_datasets': [entry(*d) for d in test_datasets],
                   'output_train': str(self.folder / 'train.safetensors'), 'output_eval': str(self.folder / 'eval.safetensors')}
        (self.folder / 'request.json').write_text(json.dumps(request))
        return self.run('--request', self.folder / 'request.json')

    def preview(self, rows):
        return self.run('--request', self.folder / 'request.json', '--preview', rows)

    def peak_kib(self):
        """The most memory that the last request's process holds when it is made once more. Not by getrusage: there, a child begins with what its parent holds."""
        peak = 0
        with subprocess.Popen([BINARY, '--request', str(self.folder / 'request.json')], stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                peak = max([peak, *map(int, re.findall(r'VmHWM:\s+(\d+) kB', pathlib.Path(f'/proc/{process.pid}/status').read_text()))])
                time.sleep(0.002)
        assert process.returncode == 0 and peak > 0
        return peak

    def run(self, *args):
        run = subprocess.run([BINARY, *map(str, args)], capture_output=True, timeout=600)
        assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
        assert run.stdout.endswith(b'\n') and run.stdout.count(b'\n') == 1
        return json.loads(run.stdout)

    def tokens(self, part='train'):
        """[(row number, ids, supervised)]"""
        with safe_open(self.folder / f'{part}.safetensors', 'np') as f:
            ids, supervised, offsets, rows = (f.get_tensor(name).tolist() for name in ('ids', 'supervised', 'offsets', 'rows'))
        return [(row, ids[a:b], supervised[a:b]) for row, a, b in zip(rows, offsets, offsets[1:])]

    def files(self):
        return sorted(p.name for p in self.folder.iterdir())
