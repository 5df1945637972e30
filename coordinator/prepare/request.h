// The contract of ppft-prepare, the sandboxed child that turns untrusted rows into token files. One process per call.
//
//   ppft-prepare --request FILE              makes the token files
//   ppft-prepare --request FILE --preview N  renders the first N rows (of all datasets in order) instead; writes nothing
//   ppft-prepare --check-tokenizer DIR --vocab_size N
//
// It prints one line of JSON on stdout and exits with 0, whether the input was good or not; any other exit (or a signal) is a crash and stderr
// holds what is known. On refusal no output file exists. The request, JSON (unknown keys are refused):
//   {"tokenizer_dir": DIR,                 folder with tokenizer.json (or tokenizer.model) and tokenizer_config.json
//    "vocab_size": 512,                    of the base model; every id must be below
//    "max_position_embeddings": 512,       of the base model; 0 = not checked
//    "data": {DataSpec in snake_case},     instruction_prefix, response_prefix, train_on_inputs, train_on_eos, sequence_len,
//                                          excess_length_strategy, val_set_size; its other keys are accepted and not read.
//                                          The spec is resolved: an absent prefix is empty, as proto JSON leaves it out
//    "datasets": [{"file": PATH, "source": "train.jsonl", "type": "summarization", "field_map": {"document": "text"}}],
//    "test_datasets": [...],               optional, the same shape: evaluation rows; excludes val_set_size above 0
//    "seed": 42,                           chooses the held-out rows
//    "output_train": PATH, "output_eval": PATH,   not read by --preview; output_eval only if there are evaluation rows
//    "threads": 2}                         optional
// `source` is the user's own name for the file: messages use it. Numbers may be JSON numbers or, as proto JSON writes int64, strings.
//
// Answers:
//   {"ok": true, "train": {"rows", "tokens", "targets", "truncated", "dropped", "max_length"}, "eval": {the same} | null}
//   {"ok": true, "rows": [{"row": 1, "source": "train.jsonl", "truncated": false, "tokens": [{"id": 1, "piece": "<s>", "text": "", "supervised": false}]}]}
//        (--preview; a token whose bytes are not UTF-8 has "text_base64" instead of "text"; the texts joined are the rendered row)
//   {"ok": true, "num_ids": 512, "eos_id": 2}                                                              (--check-tokenizer)
//   {"ok": false, "code": CODE, "message": "bad.jsonl: row 3: field completion is missing …"}
// CODE: DATASET_INVALID, TOKENIZER_MISMATCH (ids beyond the model's vocabulary, no end token), MODEL_INVALID (no tokenizer, or it does not load),
// SPEC_INVALID, DISK_FULL, INTERNAL.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ppft::coordinator::prepare {

struct DatasetRequest {
  std::string file;
  std::string source;
  std::string type;
  std::map<std::string, std::string> field_map;  // role -> key
};

struct DataOptions {
  std::string instruction_prefix;
  std::string response_prefix;
  bool train_on_inputs = false;
  bool train_on_eos = true;  // train_on_eos is not "none"
  int64_t sequence_len = 0;
  std::string excess_length_strategy = "truncate";  // drop | truncate | raise
  double val_set_size = 0;
};

struct Request {
  std::string tokenizer_dir;
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  DataOptions data;
  std::string data_json;  // the "data" object as it came, for the provenance
  std::vector<DatasetRequest> datasets;
  std::vector<DatasetRequest> test_datasets;
  uint64_t seed = 42;
  std::string output_train;
  std::string output_eval;
  int threads = 2;
};

// Refused with SPEC_INVALID and the dotted name of the field. Without `writes`, the outputs need not be named.
absl::StatusOr<Request> ParseRequest(absl::string_view text, bool writes);

// INVALID_ARGUMENT with one of the codes above; CodeOf reads it back (DATASET_INVALID for a bare INVALID_ARGUMENT, DISK_FULL, else INTERNAL).
absl::Status Refuse(absl::string_view code, absl::string_view message);
std::string CodeOf(const absl::Status& status);

}  // namespace ppft::coordinator::prepare
