// ppft-prepare: see request.h.
#include <unistd.h>

#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/status.h"
#include "common/data/rows.h"
#include "coordinator/prepare/prepare.h"
#include "coordinator/prepare/sandbox.h"

namespace ppft::coordinator::prepare {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxRequestBytes = int64_t{16} << 20;

Json ToJson(const Counts& counts) {
  return {{"rows", counts.rows},           {"tokens", counts.tokens},   {"targets", counts.targets},
          {"truncated", counts.truncated}, {"dropped", counts.dropped}, {"max_length", counts.max_length}};
}

// Each byte of the text belongs to one token: the first that reaches it.
Json ToJson(const PreviewRow& preview, const text::Tokenizer& tokenizer) {
  Json tokens = Json::array();
  size_t shown = 0;
  for (size_t t = 0; t < preview.row.tokens.size(); ++t) {
    const text::Token& token = preview.row.tokens[t];
    std::string bytes;
    if (!token.added && token.end > shown) {
      bytes = preview.row.text.substr(shown, token.end - shown);
      shown = token.end;
    }
    Json item = {{"id", token.id}, {"piece", tokenizer.Piece(token.id)}, {"supervised", preview.row.supervised[t] != 0}};
    if (data::FindInvalidUtf8(bytes) == absl::string_view::npos) {
      item["text"] = bytes;
    } else {
      item["text_base64"] = absl::Base64Escape(bytes);
    }
    tokens.push_back(std::move(item));
  }
  return {{"row", preview.row.number}, {"source", preview.source}, {"truncated", preview.row.truncated}, {"tokens", std::move(tokens)}};
}

absl::Status Sandbox(const Request& request) {
  int64_t bytes = 0;
  for (const auto* list : {&request.datasets, &request.test_datasets}) {
    for (const DatasetRequest& dataset : *list) {
      PPFT_ASSIGN_OR_RETURN(const int64_t size, FileSize(dataset.file));
      bytes += size;
    }
  }
  return EnterSandbox(LimitsFor(bytes));
}

absl::StatusOr<Json> RunRequest(const std::string& path, int64_t preview_rows) {
  PPFT_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxRequestBytes));
  PPFT_ASSIGN_OR_RETURN(const Request request, ParseRequest(text, /*writes=*/preview_rows == 0));
  PPFT_RETURN_IF_ERROR(Sandbox(request));
  PPFT_ASSIGN_OR_RETURN(const std::unique_ptr<text::Tokenizer> tokenizer, LoadTokenizer(request.tokenizer_dir, request.vocab_size));
  Json answer = {{"ok", true}};
  if (preview_rows > 0) {
    PPFT_ASSIGN_OR_RETURN(const std::vector<PreviewRow> rows, Preview(request, *tokenizer, preview_rows));
    answer["rows"] = Json::array();
    for (const PreviewRow& row : rows) answer["rows"].push_back(ToJson(row, *tokenizer));
    return answer;
  }
  PPFT_ASSIGN_OR_RETURN(const Prepared prepared, Prepare(request, *tokenizer));
  answer["train"] = ToJson(prepared.train);
  answer["eval"] = prepared.eval.has_value() ? ToJson(*prepared.eval) : Json();
  return answer;
}

absl::StatusOr<Json> CheckTokenizer(const std::string& folder, int64_t vocab_size) {
  PPFT_RETURN_IF_ERROR(EnterSandbox(LimitsFor(0)));
  PPFT_ASSIGN_OR_RETURN(const std::unique_ptr<text::Tokenizer> tokenizer, LoadTokenizer(folder, vocab_size));
  return Json{{"ok", true}, {"num_ids", tokenizer->num_ids()}, {"eos_id", *tokenizer->eos_id()}};
}

int Usage() {
  std::fputs(
      "usage: ppft-prepare --request FILE [--preview NUM_ROWS]\n"
      "       ppft-prepare --check-tokenizer DIR --vocab_size N\n"
      "Makes a token file of dataset files; ppft-coordinator starts it. The answer is one line of JSON on stdout.\n",
      stderr);
  return 2;
}

int Main(int argc, char** argv) {
  std::map<std::string, std::string> flags;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    const bool known = name == "--request" || name == "--preview" || name == "--check-tokenizer" || name == "--vocab_size";
    if (!known || i + 1 >= argc || !flags.emplace(name, argv[i + 1]).second) return Usage();
  }
  const auto number = [&](const char* name, int64_t* out) { return flags.count(name) == 0 || (absl::SimpleAtoi(flags[name], out) && *out > 0); };
  int64_t preview_rows = 0;
  int64_t vocab_size = 0;
  if (!number("--preview", &preview_rows) || !number("--vocab_size", &vocab_size)) return Usage();
  const bool checks = flags.count("--check-tokenizer") != 0;
  if (checks == (flags.count("--request") != 0) || checks != (vocab_size > 0) || (checks && preview_rows > 0)) return Usage();

  const absl::StatusOr<Json> answer = checks ? CheckTokenizer(flags["--check-tokenizer"], vocab_size) : RunRequest(flags["--request"], preview_rows);
  const Json line = answer.ok() ? *answer : Json{{"ok", false}, {"code", CodeOf(answer.status())}, {"message", std::string(answer.status().message())}};
  const std::string text = line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  const absl::Status written = WriteAll(STDOUT_FILENO, text, "stdout");
  return written.ok() ? 0 : 1;
}

}  // namespace
}  // namespace ppft::coordinator::prepare

int main(int argc, char** argv) { return ppft::coordinator::prepare::Main(argc, argv); }
