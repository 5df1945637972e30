#include "clients/ppctl/format.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "clients/ppctl/follow.h"

namespace ppft::ctl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(Format, Numbers) {
  EXPECT_EQ(FormatCount(12), "12");
  EXPECT_EQ(FormatCount(3400), "3.4k");
  EXPECT_EQ(FormatCount(1.24e9), "1.24B");
  EXPECT_EQ(FormatCount(999960), "1M");
  EXPECT_EQ(ShortDuration(absl::Seconds(42)), "42s");
  EXPECT_EQ(ShortDuration(absl::Seconds(307)), "5m07s");
  EXPECT_EQ(ShortDuration(absl::Milliseconds(59700)), "1m00s");
  EXPECT_EQ(ShortDuration(absl::Hours(2) + absl::Minutes(3)), "2h03m");
  EXPECT_EQ(ShortDuration(absl::Hours(76)), "3d04h");
  EXPECT_EQ(ShortDuration(absl::Seconds(-1)), "0s");
  google::protobuf::Timestamp time;
  EXPECT_EQ(FormatTime(time, absl::UTCTimeZone()), "-");
  time.set_seconds(1700000000);
  EXPECT_EQ(FormatTime(time, absl::UTCTimeZone()), "2023-11-14 22:13:20");
}

TEST(Format, TablesAlignCharactersNotBytes) {
  EXPECT_EQ(FormatTable({{"NAME", "N"}, {"é…", "1"}, {"longer", ""}}), "NAME    N\né…      1\nlonger\n");
  EXPECT_EQ(FormatTable({}), "");
}

TEST(Format, StepTextNamesWhatIsKnown) {
  v1::JobStatus status;
  status.set_step(12);
  EXPECT_EQ(StepText(status), "step 12");
  status.set_state(v1::JOB_STATE_RUNNING);
  status.set_total_steps(200);
  status.set_loss(3.41234);
  status.set_learning_rate(2e-4);
  status.set_tokens_per_second(1234);
  status.mutable_eta()->set_seconds(125);
  EXPECT_EQ(StepText(status), "step 12/200  loss 3.412  lr 0.0002  1.23k tok/s  eta 2m05s");
  status.set_state(v1::JOB_STATE_SUCCEEDED);
  EXPECT_THAT(StepText(status), Not(HasSubstr("eta")));
}

TEST(Format, ReasonsAreSentences) {
  v1::Reason reason;
  EXPECT_EQ(ReasonText(reason), "");
  reason.set_code("NO_CAPACITY");
  EXPECT_EQ(ReasonText(reason), "NO_CAPACITY");
  reason.set_message("needs 4 devices, 2 are there");
  reason.set_remedy("Start more workers.");
  EXPECT_EQ(ReasonText(reason), "NO_CAPACITY: needs 4 devices, 2 are there. Start more workers.");
}

TEST(Format, BarsFitTheTerminal) {
  v1::Job job;
  job.mutable_status()->set_state(v1::JOB_STATE_RUNNING);
  job.mutable_status()->set_step(50);
  job.mutable_status()->set_total_steps(100);
  EXPECT_THAT(BarLine(job, 100), HasSubstr("██████████░░░░░░░░░░  step 50/100"));
  EXPECT_LE(DisplayWidth(BarLine(job, 30)), 30u);
  job.mutable_status()->set_step(1000);
  EXPECT_THAT(BarLine(job, 100), Not(HasSubstr("░")));
  job.mutable_status()->set_state(v1::JOB_STATE_QUEUED);
  job.mutable_status()->set_queue_position(2);
  EXPECT_EQ(BarLine(job, 100), "QUEUED  position 2");
}

TEST(Format, ForeignTextCannotSteerTheTerminal) {
  EXPECT_EQ(Printable("a\x1b[2Jb\x07"), "a\\x1b[2Jb\\x07");
  EXPECT_EQ(Printable("\xc2\x9b"
                      "2J"),
            "\\u009b2J");
  EXPECT_EQ(Printable("é\tx\n"), "é\tx\n");
}

v1::PreviewDatasetResponse::Row PreviewRow() {
  v1::PreviewDatasetResponse::Row row;
  row.set_row(1);
  const auto add = [&](const std::string& text, bool supervised, const std::string& piece) {
    auto* token = row.add_tokens();
    token->set_text(text);
    token->set_supervised(supervised);
    token->set_piece(piece);
  };
  add("", false, "<s>");
  add("The", false, "▁The");
  add(" c", false, "▁c");
  add(" \xc3", true, "<0xC3>");  // one character over two tokens
  add("\xa9", true, "<0xA9>");
  add("", true, "</s>");
  return row;
}

TEST(Preview, TheRestOfACharacterIsNotPrintedTwice) {
  v1::PreviewDatasetResponse::Row row;
  for (const auto& [text, piece] : {std::pair<const char*, const char*>{"é", "<0xC3>"}, {"", "<0xA9>"}, {"ü", "Ã"}, {"", "¼"}}) {
    auto* token = row.add_tokens();
    token->set_text(text);
    token->set_piece(piece);
  }
  EXPECT_EQ(FormatPreviewRow(row, false), "row 0: 4 tokens, 0 supervised\néü\n");
}

TEST(Preview, MarksSupervisedTokens) {
  EXPECT_EQ(FormatPreviewRow(PreviewRow(), false), "row 1: 6 tokens, 3 supervised\n<s>The c[[ é</s>]]\n");
  EXPECT_EQ(FormatPreviewRow(PreviewRow(), true), "row 1: 6 tokens, 3 supervised\n\x1b[2m<s>\x1b[0mThe c\x1b[1;32m é</s>\x1b[0m\n");
}

v1::Job At(v1::JobState state, int64_t step) {
  v1::Job job;
  job.mutable_status()->set_state(state);
  job.mutable_status()->set_step(step);
  job.mutable_status()->set_total_steps(9);
  return job;
}

TEST(ProgressLines, StatesAtOnceStepsOnceASecond) {
  ProgressLines lines;
  const absl::Time t = absl::FromUnixSeconds(1000);
  EXPECT_EQ(lines.Next(At(v1::JOB_STATE_QUEUED, 0), t), std::string("QUEUED"));
  EXPECT_EQ(lines.Next(At(v1::JOB_STATE_QUEUED, 0), t + absl::Seconds(9)), std::nullopt);
  EXPECT_EQ(lines.Next(At(v1::JOB_STATE_RUNNING, 0), t + absl::Seconds(9)), std::string("RUNNING  step 0/9"));
  EXPECT_EQ(lines.Next(At(v1::JOB_STATE_RUNNING, 1), t + absl::Seconds(9.5)), std::nullopt);
  EXPECT_EQ(lines.Next(At(v1::JOB_STATE_RUNNING, 2), t + absl::Seconds(10)), std::string("RUNNING  step 2/9"));
  EXPECT_EQ(lines.Next(At(v1::JOB_STATE_EXPORTING, 9), t + absl::Seconds(10.1)), std::string("EXPORTING  step 9/9"));
}

TEST(EndText, FailuresNameReasonAndRemedy) {
  v1::Job job = At(v1::JOB_STATE_FAILED, 3);
  job.set_id("job-1");
  job.mutable_status()->mutable_reason()->set_code("DATASET_INVALID");
  job.mutable_status()->mutable_reason()->set_message("train.jsonl: row 3: is empty");
  job.mutable_status()->mutable_reason()->set_remedy("fill it");
  EXPECT_EQ(EndText(job), "job-1 FAILED at step 3\nDATASET_INVALID: train.jsonl: row 3: is empty\nWhat to do: fill it");
  job.mutable_status()->set_state(v1::JOB_STATE_SUCCEEDED);
  job.mutable_status()->set_loss(1.5);
  job.mutable_start_time()->set_seconds(100);
  job.mutable_end_time()->set_seconds(161);
  EXPECT_EQ(EndText(job), "job-1 SUCCEEDED after 1m01s at step 3, loss 1.5. Get the result with: ppctl fetch job-1");
}

}  // namespace
}  // namespace ppft::ctl
