"""A copy of a Hugging Face folder whose fp32 weights are rounded to bf16: half as much to carry to another machine. Needs numpy.

    python3 tests/gpu/narrow_model.py FOLDER NEW_FOLDER
"""
import json
import os
import shutil
import struct
import sys

import numpy


def narrow(values):
    """fp32 to bf16, to the nearest, ties to even."""
    bits = values.view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)


def main(source, folder):
    os.makedirs(folder)
    for name in os.listdir(source):
        if name.endswith(".json"):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    config = os.path.join(folder, "config.json")
    with open(config) as f:
        values = json.load(f)
    with open(config, "w") as f:
        json.dump(dict(values, torch_dtype="bfloat16"), f, indent=1)
    data = open(os.path.join(source, "model.safetensors"), "rb").read()
    size = struct.unpack("<Q", data[:8])[0]
    header, out, offset = json.loads(data[8:8 + size]), {}, 0
    parts = []
    for name, entry in header.items():
        if name == "__metadata__":
            out[name] = entry
            continue
        begin, end = (8 + size + at for at in entry["data_offsets"])
        part = data[begin:end]
        if entry["dtype"] == "F32":
            part = narrow(numpy.frombuffer(part, numpy.float32)).tobytes()
        out[name] = {**entry, "dtype": "BF16" if entry["dtype"] == "F32" else entry["dtype"], "data_offsets": [offset, offset + len(part)]}
        offset += len(part)
        parts.append(part)
    head = json.dumps(out).encode()
    head += b" " * (-len(head) % 8)
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        f.writelines(parts)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
