"""A small Llama with random weights and a tokenizer of its own, made from the demo's stories: for tests that need a model and not what it has learned."""
import json, pathlib

STORIES = pathlib.Path(__file__).resolve().parents[1] / "deploy/demo/train.jsonl"


def make_small_llama(folder):
    """Five layers, grouped-query attention, tied head: the shape of stories260K. The same bytes each time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([json.loads(line)["document"] for line in STORIES.read_text().splitlines()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        config = LlamaConfig(vocab_size=600, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
                             bos_token_id=0, eos_token_id=1, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(folder)
    return pathlib.Path(folder)
