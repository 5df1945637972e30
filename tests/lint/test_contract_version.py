"""Coordinator, workers and trainers of one version mean the same by one message: a changed contract has another version, by which workers are refused."""
import hashlib
import re

from sources import ROOT

# The version in CMakeLists.txt, and the contract that it stands for.
VERSION, CONTRACT = "0.2.0", "50cb811da01bcc20"


def contract():
    """Of all .proto files, without comments and spacing."""
    text = "".join(path.name + re.sub(r"\s+", " ", re.sub(r"//[^\n]*", "", path.read_text())) for path in sorted((ROOT / "proto/ppft/v1").glob("*.proto")))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_changed_contract_has_another_version():
    version = re.search(r"project\(ppft VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text()).group(1)
    assert (version, contract()) == (VERSION, CONTRACT), "raise the version in CMakeLists.txt if the contract changed since it was last installed anywhere, and put both here"
