#include "clients/ppctl/chrome_trace.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <tuple>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "clients/ppctl/format.h"
#include "common/pipeline/action.h"

namespace ppft::ctl {
namespace {

using Json = nlohmann::ordered_json;

// Rows from top to bottom; 0 shows the steps as a whole.
constexpr int kStepsRow = 0;
constexpr const char* kRows[] = {"steps", "compute", "sends", "receives", "collectives", "optimizer", "evaluation", "checkpoint"};

int64_t OffsetOf(const v1::TraceJobResponse& part) { return part.has_clock() ? part.clock().offset_nanos() : 0; }

int64_t FirstNanos(const std::vector<v1::TraceJobResponse>& parts) {
  int64_t first = std::numeric_limits<int64_t>::max();
  for (const v1::TraceJobResponse& part : parts) {
    for (const v1::TraceSpan& span : part.trace().spans()) first = std::min(first, span.begin_unix_nanos() + OffsetOf(part));
  }
  return first;
}

double Micros(int64_t nanos) { return static_cast<double>(nanos) / 1000.0; }

Json Metadata(const char* what, int rank, int row, const char* key, const Json& value) {
  return {{"name", what}, {"ph", "M"}, {"pid", rank}, {"tid", row}, {"args", {{key, value}}}};
}

std::string ProcessName(const v1::RankPlan& rank) {
  return absl::StrCat("rank ", rank.rank(), ": stage ", absl::StrJoin(rank.stages(), ","),
                      rank.replica() > 0 ? absl::StrCat(" of replica ", rank.replica()) : "", " on ", rank.worker(), " ", rank.device());
}

Json Complete(const std::string& name, int rank, int row, int64_t begin, int64_t duration, Json args) {
  return {{"name", name},           {"cat", kRows[row]}, {"ph", "X"}, {"pid", rank}, {"tid", row}, {"ts", Micros(begin)}, {"dur", Micros(duration)},
          {"args", std::move(args)}};
}

class Writer {
 public:
  explicit Writer(const std::vector<v1::TraceJobResponse>& parts) : parts_(parts), origin_(FirstNanos(parts)) {}

  Json Events() {
    for (const v1::TraceJobResponse& part : parts_) {
      Process(part.rank());
      for (const v1::TraceSpan& span : part.trace().spans()) Span(part, span);
    }
    for (const auto& [key, extent] : steps_) {
      const auto& [rank, step] = key;
      events_.push_back(Complete(absl::StrCat("step ", step), rank, kStepsRow, extent.first, extent.second - extent.first, {{"step", step}}));
    }
    Arrows();
    return std::move(events_);
  }

 private:
  // Which message: replica, receiving action, step.
  using Message = std::tuple<int, std::string, int64_t>;
  struct End {
    int rank = 0;
    int64_t nanos = 0;
  };

  void Process(const v1::RankPlan& rank) {
    if (!named_.emplace(rank.rank(), true).second) return;
    events_.push_back(Metadata("process_name", rank.rank(), 0, "name", ProcessName(rank)));
    events_.push_back(Metadata("process_sort_index", rank.rank(), 0, "sort_index", rank.rank()));
    for (int row = 0; row < static_cast<int>(std::size(kRows)); ++row) {
      events_.push_back(Metadata("thread_name", rank.rank(), row, "name", kRows[row]));
      events_.push_back(Metadata("thread_sort_index", rank.rank(), row, "sort_index", row));
    }
  }

  void Span(const v1::TraceJobResponse& part, const v1::TraceSpan& span) {
    const int rank = part.rank().rank();
    const int row = std::clamp<int>(span.row(), 0, static_cast<int>(std::size(kRows)) - 1);
    const int64_t begin = span.begin_unix_nanos() + OffsetOf(part) - origin_;
    const int64_t end = begin + span.duration_nanos();
    Json args = {{"step", span.step()}};
    if (span.stage() >= 0) args["stage"] = span.stage();
    if (span.microbatch() >= 0) args["microbatch"] = span.microbatch();
    if (span.evaluation()) args["evaluation"] = true;
    events_.push_back(Complete(span.name(), rank, row, begin, span.duration_nanos(), std::move(args)));
    if (span.evaluation() || span.row() == v1::TRACE_ROW_EVALUATION || span.row() == v1::TRACE_ROW_CHECKPOINT) return;
    auto& extent = steps_.emplace(std::make_pair(rank, span.step()), std::make_pair(begin, end)).first->second;
    extent = {std::min(extent.first, begin), std::max(extent.second, end)};
    const auto action = pipeline::ParseAction(span.name());
    if (!action.ok()) return;
    if (pipeline::IsSend(action->op)) sends_[{part.rank().replica(), pipeline::ToString(pipeline::MatchingReceive(*action)), span.step()}] = {rank, begin};
    if (pipeline::IsReceive(action->op)) receives_[{part.rank().replica(), span.name(), span.step()}] = {rank, end};
  }

  void Arrows() {
    int64_t id = 0;
    for (const auto& [message, send] : sends_) {
      const auto receive = receives_.find(message);
      if (receive == receives_.end()) continue;
      Json arrow = {{"name", std::get<1>(message)}, {"cat", "message"},        {"ph", "s"}, {"id", ++id}, {"pid", send.rank},
                    {"tid", v1::TRACE_ROW_SEND},    {"ts", Micros(send.nanos)}};
      events_.push_back(arrow);
      arrow["ph"] = "f";
      arrow["bp"] = "e";
      arrow["pid"] = receive->second.rank;
      arrow["tid"] = v1::TRACE_ROW_RECEIVE;
      arrow["ts"] = Micros(receive->second.nanos);
      events_.push_back(std::move(arrow));
    }
  }

  const std::vector<v1::TraceJobResponse>& parts_;
  const int64_t origin_;
  Json events_ = Json::array();
  std::map<int, bool> named_;
  std::map<std::pair<int, int64_t>, std::pair<int64_t, int64_t>> steps_;  // (rank, step) -> begin, end
  std::map<Message, End> sends_;
  std::map<Message, End> receives_;
};

}  // namespace

std::string ChromeTrace(const std::string& job_id, const std::vector<v1::TraceJobResponse>& parts) {
  Json trace;
  trace["displayTimeUnit"] = "ms";
  Json& about = trace["otherData"];
  about["job"] = job_id;
  const bool any = FirstNanos(parts) != std::numeric_limits<int64_t>::max();
  about["begin_unix_nanos"] = any ? FirstNanos(parts) : 0;
  for (const v1::TraceJobResponse& part : parts) {
    about["first_step"] = part.trace().first_step();
    about["last_step"] = part.trace().last_step();
    about["times"] = part.trace().device_times() ? "device" : "host";
    about[absl::StrCat("clock_offset_nanos_of_rank_", part.rank().rank())] = OffsetOf(part);
    if (part.has_clock()) about[absl::StrCat("clock_error_nanos_of_rank_", part.rank().rank())] = part.clock().error_nanos();
  }
  trace["traceEvents"] = Writer(parts).Events();
  return trace.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string TraceSummary(const std::vector<v1::TraceJobResponse>& parts) {
  struct Sums {
    const v1::RankPlan* plan = nullptr;
    int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;
    std::map<int, int64_t> nanos;  // by row
  };
  std::map<int, Sums> ranks;
  for (const v1::TraceJobResponse& part : parts) {
    Sums& sums = ranks[part.rank().rank()];
    sums.plan = &part.rank();
    for (const v1::TraceSpan& span : part.trace().spans()) {
      sums.begin = std::min(sums.begin, span.begin_unix_nanos());
      sums.end = std::max(sums.end, span.begin_unix_nanos() + span.duration_nanos());
      sums.nanos[span.row()] += span.duration_nanos();
    }
  }
  std::vector<std::vector<std::string>> rows = {{"RANK", "STAGES", "ON", "TIME"}};
  for (const int row :
       {v1::TRACE_ROW_COMPUTE, v1::TRACE_ROW_SEND, v1::TRACE_ROW_RECEIVE, v1::TRACE_ROW_COLLECTIVE, v1::TRACE_ROW_OPTIMIZER, v1::TRACE_ROW_CHECKPOINT}) {
    rows[0].push_back(absl::AsciiStrToUpper(kRows[row]));
  }
  rows[0].push_back("REST");
  for (auto& [rank, sums] : ranks) {
    if (sums.end <= sums.begin) continue;
    const auto total = static_cast<double>(sums.end - sums.begin);
    std::vector<std::string> row = {absl::StrCat(rank), absl::StrJoin(sums.plan->stages(), ","), absl::StrCat(sums.plan->worker(), " ", sums.plan->device()),
                                    absl::StrFormat("%.1f ms", total / 1e6)};
    double rest = total;
    for (const int kind :
         {v1::TRACE_ROW_COMPUTE, v1::TRACE_ROW_SEND, v1::TRACE_ROW_RECEIVE, v1::TRACE_ROW_COLLECTIVE, v1::TRACE_ROW_OPTIMIZER, v1::TRACE_ROW_CHECKPOINT}) {
      const auto nanos = static_cast<double>(sums.nanos[kind]);
      rest -= nanos;
      row.push_back(absl::StrFormat("%.1f %%", 100 * nanos / total));
    }
    row.push_back(absl::StrFormat("%.1f %%", 100 * std::max(0.0, rest) / total));
    rows.push_back(std::move(row));
  }
  return rows.size() > 1 ? FormatTable(rows) : "";
}

}  // namespace ppft::ctl
