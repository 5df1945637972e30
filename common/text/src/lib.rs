//! The text library behind a C ABI: Hugging Face tokenizers and chat templates. `tokenizer.cc` and
//! `chat_template.cc` are its only callers and state the contract.
//!
//! Every entry point catches panics, so that hostile input ends in an error text and never unwinds into C++. Texts come as (pointer, length) in
//! UTF-8; error and result texts are returned as owned C strings, freed by `ppft_text_free`.

mod chat;
mod tokenizer;

use std::ffi::{c_char, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;

use tokenizer::Loaded;

/// The tokens of one text; the arrays have `len` entries and belong to `ppft_encoding_free`.
#[repr(C)]
pub struct PpftEncoding {
    len: usize,
    ids: *mut u32,
    /// Byte range in the text that was given; empty for what the tokenizer added.
    begin: *mut u32,
    end: *mut u32,
    /// 1 where the post-processor added the token (BOS, EOS).
    added: *mut u8,
}

fn owned_text(text: &str) -> *mut c_char {
    CString::new(text.replace('\0', " ")).unwrap_or_default().into_raw()
}

/// # Safety
/// `data` points to `len` bytes, or `len` is 0.
unsafe fn bytes<'a>(data: *const u8, len: usize) -> &'a [u8] {
    if len == 0 {
        &[]
    } else {
        std::slice::from_raw_parts(data, len)
    }
}

/// Runs `body`; a failure or a panic is stored in `*error` and gives `fallback`.
unsafe fn guarded<T>(error: *mut *mut c_char, fallback: T, body: impl FnOnce() -> Result<T, String>) -> T {
    let message = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => return value,
        Ok(Err(message)) => message,
        Err(panic) => panic
            .downcast_ref::<&str>()
            .map(|text| text.to_string())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "panic without a message".to_string()),
    };
    *error = owned_text(&message);
    fallback
}

fn raw<T>(values: Vec<T>) -> *mut T {
    Box::into_raw(values.into_boxed_slice()) as *mut T
}

unsafe fn drop_raw<T>(values: *mut T, len: usize) {
    if !values.is_null() {
        drop(Box::from_raw(ptr::slice_from_raw_parts_mut(values, len)));
    }
}

/// Loads tokenizer.json as transformers would under this tokenizer_config.json (empty: none). Null on error.
///
/// # Safety
/// The two texts are readable for their lengths; `error` is writable.
#[no_mangle]
pub unsafe extern "C" fn ppft_tokenizer_load(json: *const u8, json_len: usize, config: *const u8, config_len: usize, error: *mut *mut c_char) -> *mut Loaded {
    guarded(error, ptr::null_mut(), || {
        let loaded = Loaded::new(bytes(json, json_len), bytes(config, config_len))?;
        Ok(Box::into_raw(Box::new(loaded)))
    })
}

/// # Safety
/// `tokenizer` came from `ppft_tokenizer_load` and is not used again.
#[no_mangle]
pub unsafe extern "C" fn ppft_tokenizer_free(tokenizer: *mut Loaded) {
    if !tokenizer.is_null() {
        drop(Box::from_raw(tokenizer));
    }
}

/// Encodes a whole text with the tokens that the post-processor adds. 1 on success; safe from several threads on one tokenizer.
///
/// # Safety
/// `tokenizer` is alive, the text readable, `out` and `error` writable.
#[no_mangle]
pub unsafe extern "C" fn ppft_tokenizer_encode(tokenizer: *const Loaded, text: *const u8, len: usize, out: *mut PpftEncoding, error: *mut *mut c_char) -> i32 {
    guarded(error, 0, || {
        let text = std::str::from_utf8(bytes(text, len)).map_err(|e| e.to_string())?;
        let tokens = (*tokenizer).encode(text)?;
        *out = PpftEncoding {
            len: tokens.ids.len(),
            ids: raw(tokens.ids),
            begin: raw(tokens.begin),
            end: raw(tokens.end),
            added: raw(tokens.added),
        };
        Ok(1)
    })
}

/// # Safety
/// `encoding` was filled by `ppft_tokenizer_encode` and is not used again.
#[no_mangle]
pub unsafe extern "C" fn ppft_encoding_free(encoding: *mut PpftEncoding) {
    let e = &*encoding;
    drop_raw(e.ids, e.len);
    drop_raw(e.begin, e.len);
    drop_raw(e.end, e.len);
    drop_raw(e.added, e.len);
}

/// The largest id plus one, added tokens included.
///
/// # Safety
/// `tokenizer` is alive.
#[no_mangle]
pub unsafe extern "C" fn ppft_tokenizer_num_ids(tokenizer: *const Loaded) -> u64 {
    (*tokenizer).num_ids
}

/// The most bytes of text that one ordinary token can stand for.
///
/// # Safety
/// `tokenizer` is alive.
#[no_mangle]
pub unsafe extern "C" fn ppft_tokenizer_max_piece_bytes(tokenizer: *const Loaded) -> u64 {
    (*tokenizer).max_piece_bytes
}

/// The id of a token as the vocabulary writes it, or -1.
///
/// # Safety
/// `tokenizer` is alive, the text readable.
#[no_mangle]
pub unsafe extern "C" fn ppft_tokenizer_token_to_id(tokenizer: *const Loaded, token: *const u8, len: usize) -> i64 {
    match std::str::from_utf8(bytes(token, len)) {
        Ok(token) => (*tokenizer).token_to_id(token).map_or(-1, i64::from),
        Err(_) => -1,
    }
}

/// The token as the vocabulary writes it; null if there is no such id.
///
/// # Safety
/// `tokenizer` is alive.
#[no_mangle]
pub unsafe extern "C" fn ppft_tokenizer_id_to_token(tokenizer: *const Loaded, id: u32) -> *mut c_char {
    (*tokenizer).id_to_token(id).map_or(ptr::null_mut(), |piece| owned_text(&piece))
}

/// # Safety
/// `text` came from this library and is not used again.
#[no_mangle]
pub unsafe extern "C" fn ppft_text_free(text: *mut c_char) {
    if !text.is_null() {
        drop(CString::from_raw(text));
    }
}

/// Renders a chat template with a JSON object as its variables. 1 on success.
///
/// # Safety
/// The two texts are readable for their lengths; `error` is writable.
#[no_mangle]
pub unsafe extern "C" fn ppft_chat_render(
    template: *const u8,
    template_len: usize,
    context: *const u8,
    context_len: usize,
    out: *mut RenderedText,
    error: *mut *mut c_char,
) -> i32 {
    guarded(error, 0, || {
        let template = std::str::from_utf8(bytes(template, template_len)).map_err(|e| e.to_string())?;
        let text = chat::render(template, bytes(context, context_len))?.into_bytes();
        *out = RenderedText {
            len: text.len(),
            data: raw(text),
        };
        Ok(1)
    })
}

/// A text that may hold NUL, freed by `ppft_rendered_free`.
#[repr(C)]
pub struct RenderedText {
    len: usize,
    data: *mut u8,
}

/// # Safety
/// `text` was filled by `ppft_chat_render` and is not used again.
#[no_mangle]
pub unsafe extern "C" fn ppft_rendered_free(text: *mut RenderedText) {
    drop_raw((*text).data, (*text).len);
}
