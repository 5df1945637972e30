//! tokenizer.json, loaded so that it gives the ids of `transformers.AutoTokenizer` (5.x).

use serde_json::{json, Value};
use tokenizers::{AddedToken, Tokenizer};

pub struct Loaded {
    tokenizer: Tokenizer,
    pub num_ids: u64,
    pub max_piece_bytes: u64,
}

pub struct Tokens {
    pub ids: Vec<u32>,
    pub begin: Vec<u32>,
    pub end: Vec<u32>,
    pub added: Vec<u8>,
}

const NAMED_TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl Loaded {
    pub fn new(json: &[u8], config: &[u8]) -> Result<Self, String> {
        let config: Value = if config.is_empty() {
            json!({})
        } else {
            serde_json::from_slice(config).map_err(|e| format!("tokenizer_config.json: {e}"))?
        };
        let mut tokenizer = if is_llama_class(&config) { load_llama(json, &config)? } else { load(json)? };

        // A text is encoded whole, always the same way.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
        tokenizer.set_encode_special_tokens(config["split_special_tokens"].as_bool().unwrap_or(false));
        add_named_tokens(&mut tokenizer, &config);

        let vocab = tokenizer.get_vocab(true);
        let num_ids = vocab.values().max().map_or(0, |id| u64::from(*id) + 1);
        if num_ids == 0 {
            return Err("the vocabulary is empty".to_string());
        }
        let max_piece_bytes = vocab.keys().map(|piece| piece.len() as u64).max().unwrap_or(1).max(4);
        Ok(Self {
            tokenizer,
            num_ids,
            max_piece_bytes,
        })
    }

    pub fn encode(&self, text: &str) -> Result<Tokens, String> {
        if text.len() > u32::MAX as usize {
            return Err("the text is longer than 4 GiB".to_string());
        }
        let encoding = self.tokenizer.encode(text, true).map_err(|e| e.to_string())?;
        Ok(Tokens {
            ids: encoding.get_ids().to_vec(),
            begin: encoding.get_offsets().iter().map(|o| o.0 as u32).collect(),
            end: encoding.get_offsets().iter().map(|o| o.1 as u32).collect(),
            added: encoding.get_special_tokens_mask().iter().map(|m| u8::from(*m != 0)).collect(),
        })
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }
}

fn load(json: &[u8]) -> Result<Tokenizer, String> {
    Tokenizer::from_bytes(json).map_err(|e| e.to_string())
}

fn is_llama_class(config: &Value) -> bool {
    matches!(config["tokenizer_class"].as_str(), Some("LlamaTokenizer" | "LlamaTokenizerFast"))
}

/// transformers 5 takes only vocabulary, merges, added tokens and post-processor from the file under LlamaTokenizer and sets the rest itself:
/// no normalizer, Metaspace, byte fallback. It differs from most files in texts that begin with a space. Byte-level files are left as they are.
fn load_llama(bytes: &[u8], config: &Value) -> Result<Tokenizer, String> {
    let mut file: Value = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let is_byte_level = has_byte_level(&file["pre_tokenizer"]) || has_byte_level(&file["decoder"]);
    if is_byte_level || file["model"]["type"] != "BPE" {
        return load(bytes);
    }
    let prefix_space = config["add_prefix_space"].as_bool().unwrap_or(true);
    let legacy = config.get("legacy").and_then(Value::as_bool).unwrap_or(false);
    let scheme = match (prefix_space, legacy) {
        (false, _) => "never",
        (true, true) => "always",
        (true, false) => "first",
    };
    file["normalizer"] = Value::Null;
    file["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let model = &mut file["model"];
    model["dropout"] = Value::Null;
    model["unk_token"] = Value::Null;
    model["fuse_unk"] = json!(true);
    model["byte_fallback"] = json!(true);
    model["ignore_merges"] = json!(false);
    load(&serde_json::to_vec(&file).map_err(|e| e.to_string())?)
}

fn has_byte_level(part: &Value) -> bool {
    match part {
        Value::Object(fields) => fields.get("type").is_some_and(|t| t == "ByteLevel") || fields.values().any(has_byte_level),
        Value::Array(items) => items.iter().any(has_byte_level),
        _ => false,
    }
}

/// transformers recognises the named special tokens in a text even if tokenizer.json does not list them as added. Names without an id stay out:
/// they would get ids beyond the model's vocabulary.
fn add_named_tokens(tokenizer: &mut Tokenizer, config: &Value) {
    let known: Vec<String> = tokenizer.get_added_tokens_decoder().values().map(|token| token.content.clone()).collect();
    for name in NAMED_TOKENS {
        let value = &config[name];
        if let Some(content) = value.as_str().or_else(|| value["content"].as_str()) {
            if !known.iter().any(|k| k == content) && tokenizer.token_to_id(content).is_some() {
                tokenizer.add_special_tokens(&[AddedToken::from(content, true)]);
            }
        }
    }
}
