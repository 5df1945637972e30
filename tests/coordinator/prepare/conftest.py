"""Fixtures of the ppft-prepare tests."""
import json

import pytest
from prepare_tool import BINARY


@pytest.fixture(scope='session', autouse=True)
def built():
    assert BINARY.exists(), f'{BINARY} is missing: build ppft-prepare first'


@pytest.fixture(scope='session')
def own_tokenizer(tmp_path_factory):
    """A byte-level BPE tokenizer trained here: BOS by its post-processor, no vendor's file needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    words = ['the cat sat on the mat and looked at the moon', 'once upon a time there was a little boy named Tim', 'a bird saw the big dog and ran away',
             'Summarize the following article', 'Summary', 'she wanted to help mom make a cake but the flour was gone'] * 4
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, special_tokens=['<s>', '</s>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                             show_progress=False))
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False),
                                                    processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])])
    folder = tmp_path_factory.mktemp('tokenizer')
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>'}))
    return folder
