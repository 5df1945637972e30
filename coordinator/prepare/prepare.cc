#include "coordinator/prepare/prepare.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/files.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/data/philox.h"

namespace ppft::coordinator::prepare {
namespace {

using Json = nlohmann::json;

// Rows read ahead of the tokeniser threads.
constexpr size_t kBatchRows = 512;
constexpr size_t kBatchBytes = size_t{8} << 20;

// Tokenises the batch; results in the rows' order.
std::vector<absl::StatusOr<TokenizedRow>> TokenizeBatch(const RowTokenizer& tokenizer, const data::RowFormat& format, const std::vector<data::Row>& batch,
                                                        int threads) {
  std::vector<absl::StatusOr<TokenizedRow>> results(batch.size(), absl::StatusOr<TokenizedRow>(TokenizedRow()));
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next.fetch_add(1); i < batch.size(); i = next.fetch_add(1)) results[i] = tokenizer.Tokenize(format, batch[i]);
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads && static_cast<size_t>(i) < batch.size(); ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  return results;
}

// All rows of one file into the spool. The first bad row in the file's order is the one that is named, whichever thread met another first.
absl::Status AddDataset(const DatasetRequest& dataset, const RowTokenizer& tokenizer, int threads, Spool* spool) {
  PPFT_ASSIGN_OR_RETURN(const data::RowFormat format, data::MakeRowFormat(dataset.source, dataset.type, dataset.field_map));
  PPFT_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(dataset.file));
  data::RowReader reader(file.bytes(), format);
  std::vector<data::Row> batch;
  int64_t num_rows = 0;
  for (bool at_end = false; !at_end;) {
    batch.clear();
    size_t bytes = 0;
    absl::Status read;
    while (batch.size() < kBatchRows && bytes < kBatchBytes) {
      data::Row row;
      absl::StatusOr<bool> found = reader.Next(&row);
      read = found.status();
      at_end = !found.ok() || !*found;
      if (at_end) break;
      bytes += row.context.size() + row.answer.size();
      batch.push_back(std::move(row));
    }
    num_rows += static_cast<int64_t>(batch.size());
    for (const absl::StatusOr<TokenizedRow>& result : TokenizeBatch(tokenizer, format, batch, threads)) {
      PPFT_RETURN_IF_ERROR(result.status());
      PPFT_RETURN_IF_ERROR(spool->Add(*result));
    }
    PPFT_RETURN_IF_ERROR(read);
  }
  return num_rows == 0 ? data::EmptyDatasetError(dataset.source) : absl::OkStatus();
}

absl::StatusOr<Spool> SpoolAll(const std::vector<DatasetRequest>& datasets, const RowTokenizer& tokenizer, const Request& request, const std::string& output) {
  PPFT_ASSIGN_OR_RETURN(Spool spool, Spool::Create(output));
  for (const DatasetRequest& dataset : datasets) PPFT_RETURN_IF_ERROR(AddDataset(dataset, tokenizer, request.threads, &spool));
  if (spool.num_rows() == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        datasets[0].source, ": the dataset is empty: ",
        spool.num_dropped() == 1 ? std::string("its only row was dropped, it") : absl::StrCat("all ", spool.num_dropped(), " rows were dropped, each"),
        " has more tokens than sequence_len (", request.data.sequence_len, "): raise sequence_len, or set excess_length_strategy to truncate"));
  }
  return spool;
}

std::vector<int64_t> AllRows(int64_t count) {
  std::vector<int64_t> rows(static_cast<size_t>(count));
  std::iota(rows.begin(), rows.end(), int64_t{0});
  return rows;
}

// A seeded choice of round(share x count) rows, at least one on each side; both lists ascending.
struct Split {
  std::vector<int64_t> train;
  std::vector<int64_t> eval;
};
Split HoldOut(int64_t count, double share, uint64_t seed) {
  Split split;
  split.train = AllRows(count);
  data::PhiloxStream random(seed, data::PhiloxDomain::kHeldOut, 0);
  data::Shuffle(random, split.train);
  const int64_t held = std::clamp<int64_t>(std::llround(share * static_cast<double>(count)), 1, count - 1);
  split.eval.assign(split.train.begin(), split.train.begin() + held);
  split.train.erase(split.train.begin(), split.train.begin() + held);
  std::sort(split.train.begin(), split.train.end());
  std::sort(split.eval.begin(), split.eval.end());
  return split;
}

std::map<std::string, std::string> Provenance(const Request& request, const std::string& part, const std::string& tokenizer_sha256) {
  Json sources = Json::array();
  for (const auto* list : {&request.datasets, &request.test_datasets}) {
    for (const DatasetRequest& dataset : *list) sources.push_back({{"source", dataset.source}, {"type", dataset.type}, {"field_map", dataset.field_map}});
  }
  const auto dump = [](const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); };
  return {{"format", "ppft-tokens-1"},           {"part", part}, {"sources", dump(sources)}, {"data", request.data_json}, {"seed", absl::StrCat(request.seed)},
          {"tokenizer_sha256", tokenizer_sha256}};
}

absl::StatusOr<std::string> TokenizerSha256(const std::string& folder) {
  const std::string json = JoinPath(folder, "tokenizer.json");
  return Sha256File(PathExists(json) ? json : JoinPath(folder, "tokenizer.model"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<text::Tokenizer>> LoadTokenizer(const std::string& folder, int64_t vocab_size) {
  absl::StatusOr<std::unique_ptr<text::Tokenizer>> tokenizer = text::Tokenizer::Load(folder);
  if (!tokenizer.ok()) return Refuse("MODEL_INVALID", tokenizer.status().message());
  const int64_t num_ids = (*tokenizer)->num_ids();
  if (num_ids > vocab_size) {
    return Refuse("TOKENIZER_MISMATCH",
                  absl::StrCat(folder, ": the tokenizer has ids up to ", num_ids - 1, " (", (*tokenizer)->Piece(static_cast<uint32_t>(num_ids - 1)),
                               "), but the model's vocab_size is ", vocab_size, ": use the tokenizer that belongs to the model"));
  }
  if (!(*tokenizer)->eos_id().has_value()) {
    const std::string& piece = (*tokenizer)->eos_piece();
    const std::string what = piece.empty() ? "no eos_token is named" : absl::StrCat("the eos_token ", piece, " is not in the vocabulary");
    return Refuse("TOKENIZER_MISMATCH", absl::StrCat(folder, ": ", what, ": set eos_token in tokenizer_config.json to a token of the vocabulary"));
  }
  return tokenizer;
}

absl::StatusOr<Prepared> Prepare(const Request& request, const text::Tokenizer& tokenizer) {
  const RowTokenizer rows(tokenizer, request.data);
  PPFT_ASSIGN_OR_RETURN(const std::string sha256, TokenizerSha256(request.tokenizer_dir));
  PPFT_ASSIGN_OR_RETURN(Spool spool, SpoolAll(request.datasets, rows, request, request.output_train));
  std::optional<Spool> test_spool;
  Split split;
  if (!request.test_datasets.empty()) {
    PPFT_ASSIGN_OR_RETURN(test_spool, SpoolAll(request.test_datasets, rows, request, request.output_eval));
    split.train = AllRows(spool.num_rows());
    split.eval = AllRows(test_spool->num_rows());
  } else if (request.data.val_set_size > 0) {
    if (spool.num_rows() < 2) {
      return absl::InvalidArgumentError(
          absl::StrCat(request.datasets[0].source, ": has one usable row, but val_set_size holds rows out: add rows or set it to 0"));
    }
    split = HoldOut(spool.num_rows(), request.data.val_set_size, request.seed);
  } else {
    split.train = AllRows(spool.num_rows());
  }

  Prepared prepared;
  const std::string train_part = absl::StrCat(request.output_train, ".part");
  const std::string eval_part = absl::StrCat(request.output_eval, ".part");
  const auto write = [&]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(prepared.train, spool.Write(split.train, Provenance(request, "train", sha256), train_part));
    prepared.train.dropped = spool.num_dropped();
    if (!split.eval.empty()) {
      Spool& source = test_spool.has_value() ? *test_spool : spool;
      PPFT_ASSIGN_OR_RETURN(prepared.eval, source.Write(split.eval, Provenance(request, "eval", sha256), eval_part));
      if (test_spool.has_value()) prepared.eval->dropped = test_spool->num_dropped();
      PPFT_RETURN_IF_ERROR(RenameDurably(eval_part, request.output_eval));
    }
    return RenameDurably(train_part, request.output_train);
  };
  const absl::Status status = write();
  if (!status.ok()) {  // best effort: the error that counts is `status`
    unlink(train_part.c_str());
    if (!split.eval.empty()) {
      unlink(eval_part.c_str());
      unlink(request.output_eval.c_str());
    }
    return status;
  }
  return prepared;
}

absl::StatusOr<std::vector<PreviewRow>> Preview(const Request& request, const text::Tokenizer& tokenizer, int64_t num_rows) {
  const RowTokenizer rows(tokenizer, request.data);
  std::vector<PreviewRow> out;
  for (const DatasetRequest& dataset : request.datasets) {
    PPFT_ASSIGN_OR_RETURN(const data::RowFormat format, data::MakeRowFormat(dataset.source, dataset.type, dataset.field_map));
    PPFT_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(dataset.file));
    data::RowReader reader(file.bytes(), format);
    data::Row row;
    bool any = false;
    while (static_cast<int64_t>(out.size()) < num_rows) {
      PPFT_ASSIGN_OR_RETURN(const bool found, reader.Next(&row));
      if (!found && !any) return data::EmptyDatasetError(dataset.source);
      if (!found) break;
      any = true;
      PPFT_ASSIGN_OR_RETURN(TokenizedRow tokenized, rows.Tokenize(format, row, /*keep_text=*/true));
      if (!tokenized.dropped) out.push_back({dataset.source, std::move(tokenized)});
    }
  }
  return out;
}

}  // namespace ppft::coordinator::prepare
