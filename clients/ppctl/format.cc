#include "clients/ppctl/format.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/base/format.h"

namespace ppft::ctl {
namespace {

constexpr char kSupervised[] = "\x1b[1;32m";
constexpr char kAdded[] = "\x1b[2m";
constexpr char kPlain[] = "\x1b[0m";

// At most `width` columns.
std::string Fit(const std::string& text, size_t width) {
  if (DisplayWidth(text) <= width) return text;
  std::string out;
  size_t columns = 0;
  for (size_t i = 0; i < text.size();) {
    size_t next = i + 1;
    while (next < text.size() && (static_cast<unsigned char>(text[next]) & 0xC0) == 0x80) ++next;
    if (++columns >= width) break;
    out.append(text, i, next - i);
    i = next;
  }
  return out + "…";
}

}  // namespace

std::string FormatCount(double value) {
  const char* unit = "";
  for (const char* larger : {"k", "M", "B", "T"}) {
    if (std::abs(value) < 999.5) break;
    value /= 1000;
    unit = larger;
  }
  return absl::StrCat(unit[0] == '\0' ? absl::StrFormat("%.0f", value) : absl::StrFormat("%.3g", value), unit);
}

std::string ShortDuration(absl::Duration duration) {
  if (duration < absl::ZeroDuration()) duration = absl::ZeroDuration();
  const int64_t s = absl::ToInt64Seconds(duration + absl::Milliseconds(500));
  if (s < 60) return absl::StrCat(s, "s");
  if (s < 3600) return absl::StrFormat("%dm%02ds", s / 60, s % 60);
  if (s < 86400) return absl::StrFormat("%dh%02dm", s / 3600, s / 60 % 60);
  return absl::StrFormat("%dd%02dh", s / 86400, s / 3600 % 24);
}

std::string FormatLoss(double value) { return absl::StrFormat("%.4g", value); }

std::string FormatTime(const google::protobuf::Timestamp& time, absl::TimeZone zone) {
  if (time.seconds() == 0) return "-";
  return absl::FormatTime("%Y-%m-%d %H:%M:%S", ToTime(time), zone);
}

std::string HardwareText(const v1::Device& device) {
  std::vector<std::string> parts;
  if (device.threads() > 0) parts.push_back(absl::StrCat(device.threads(), device.threads() == 1 ? " thread" : " threads"));
  if (device.memory_bytes() > 0) parts.push_back(FormatBytes(device.memory_bytes()));
  if (!device.compute_capability().empty()) parts.push_back(absl::StrCat("compute capability ", device.compute_capability()));
  if (!device.driver().empty()) parts.push_back(absl::StrCat("driver ", device.driver()));
  return absl::StrJoin(parts, ", ");
}

std::string StateWord(v1::JobState state) {
  const std::string name = v1::JobState_Name(state);
  const absl::string_view prefix = "JOB_STATE_";
  return absl::StartsWith(name, prefix) ? name.substr(prefix.size()) : absl::StrCat("STATE_", static_cast<int>(state));
}

bool IsTerminal(v1::JobState state) { return state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_FAILED || state == v1::JOB_STATE_CANCELLED; }

size_t DisplayWidth(absl::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

std::string FormatTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], DisplayWidth(row[i]));
  }
  std::string out;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) absl::StrAppend(&line, row[i], std::string(widths[i] - DisplayWidth(row[i]) + 2, ' '));
    line.erase(line.find_last_not_of(' ') + 1);
    absl::StrAppend(&out, line, "\n");
  }
  return out;
}

std::string StepText(const v1::JobStatus& status, bool brief) {
  std::vector<std::string> parts;
  parts.push_back(status.total_steps() > 0 ? absl::StrCat("step ", status.step(), "/", status.total_steps()) : absl::StrCat("step ", status.step()));
  if (status.has_loss()) parts.push_back(absl::StrCat("loss ", FormatLoss(status.loss())));
  if (status.has_eval_loss()) parts.push_back(absl::StrCat("eval_loss ", FormatLoss(status.eval_loss())));
  if (status.has_learning_rate() && !brief) parts.push_back(absl::StrFormat("lr %.3g", status.learning_rate()));
  if (status.tokens_per_second() > 0) parts.push_back(absl::StrCat(FormatCount(status.tokens_per_second()), " tok/s"));
  if (status.has_eta() && !IsTerminal(status.state())) parts.push_back(absl::StrCat("eta ", ShortDuration(ToDuration(status.eta()))));
  return absl::StrJoin(parts, "  ");
}

std::string ReasonText(const v1::Reason& reason) {
  std::vector<std::string> parts;
  if (!reason.code().empty()) parts.push_back(reason.message().empty() && reason.remedy().empty() ? reason.code() : absl::StrCat(reason.code(), ":"));
  if (!reason.message().empty()) parts.push_back(reason.message());
  if (!reason.remedy().empty()) parts.push_back(reason.remedy());
  std::string text;
  for (const std::string& part : parts) {
    const char last = text.empty() ? ':' : text.back();
    absl::StrAppend(&text, text.empty() ? "" : last == ':' || last == '.' || last == '!' || last == '?' ? " " : ". ", part);
  }
  return Printable(text);
}

std::string StatusLine(const v1::Job& job) {
  const v1::JobStatus& status = job.status();
  std::string line = StateWord(status.state());
  if (status.state() == v1::JOB_STATE_RUNNING || (status.step() > 0 && status.state() != v1::JOB_STATE_QUEUED)) {
    absl::StrAppend(&line, "  ", StepText(status));
  }
  if (status.state() == v1::JOB_STATE_QUEUED && status.queue_position() > 0) absl::StrAppend(&line, "  position ", status.queue_position());
  if (status.state() != v1::JOB_STATE_RUNNING && status.state() != v1::JOB_STATE_SUCCEEDED) {
    const std::string reason = ReasonText(status.reason());
    if (!reason.empty()) absl::StrAppend(&line, "  ", reason);
  }
  return line;
}

std::string BarLine(const v1::Job& job, size_t width) {
  constexpr int kBar = 20;
  const v1::JobStatus& status = job.status();
  std::string line = absl::StrFormat("%-10s ", StateWord(status.state()));
  if (status.state() == v1::JOB_STATE_RUNNING && status.total_steps() > 0) {
    const int filled = static_cast<int>(std::clamp<int64_t>(status.step() * kBar / status.total_steps(), 0, kBar));
    for (int i = 0; i < kBar; ++i) line += i < filled ? "█" : "░";
    absl::StrAppend(&line, "  ", StepText(status, /*brief=*/true));
  } else {
    line = StatusLine(job);
  }
  return Fit(line, width);
}

std::string Printable(absl::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const unsigned char c = static_cast<unsigned char>(text[i]);
    // C0, DEL, and the C1 controls U+0080..U+009F in UTF-8.
    if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7F) {
      absl::StrAppendFormat(&out, "\\x%02x", c);
    } else if (c == 0xC2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xA0) {
      absl::StrAppendFormat(&out, "\\u%04x", static_cast<unsigned char>(text[++i]));
    } else {
      out += text[i];
    }
  }
  return out;
}

std::string FormatPreviewRow(const v1::PreviewDatasetResponse::Row& row, bool color) {
  int64_t supervised = 0;
  for (const auto& token : row.tokens()) supervised += token.supervised();
  std::string out =
      absl::StrCat("row ", row.row(), ": ", Counted(row.tokens_size(), "token"), ", ", supervised, " supervised", row.truncated() ? ", truncated" : "", "\n");
  bool open = false;
  const auto mark = [&](bool on) {
    if (on == open) return;
    out += color ? (on ? kSupervised : kPlain) : (on ? "[[" : "]]");
    open = on;
  };
  // Bytes of one character may be spread over several tokens: they are joined before they are printed.
  std::string text;
  const auto flush = [&] {
    out += Printable(text);
    text.clear();
  };
  for (const auto& token : row.tokens()) {
    if (token.supervised() != open) flush();
    mark(token.supervised());
    if (!token.text().empty()) {
      text += token.text();
      continue;
    }
    // Without text of its own: a special token, or the rest of a character whose first token stands for all its bytes.
    const bool special = (absl::StartsWith(token.piece(), "<") || absl::StartsWith(token.piece(), "[")) && !absl::StartsWith(token.piece(), "<0x");
    if (!special) continue;
    flush();
    const std::string piece = Printable(token.piece());
    out += color && !open ? absl::StrCat(kAdded, piece, kPlain) : piece;
  }
  flush();
  mark(false);
  return out + "\n";
}

}  // namespace ppft::ctl
