#include "coordinator/service/job_service.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/sha256.h"
#include "common/base/status.h"
#include "common/spec/spec.h"
#include "coordinator/core/job_state.h"
#include "coordinator/job_planner.h"
#include "coordinator/service/answer.h"
#include "coordinator/service/feed.h"

namespace ppft::coordinator {
namespace {

constexpr int kDefaultPageSize = 100;
constexpr int kMaxPageSize = 1000;
constexpr int kMaxMetricRows = 10000;
constexpr int kFeedBatch = 256;
constexpr int kDefaultTraceSteps = 3;
constexpr size_t kMaxRequestId = 128;
constexpr size_t kMaxPageBytes = 3 << 20;  // of a response; messages stay under 4 MiB

// The same message gives the same digest: maps are written in order.
std::string PayloadSha256(const google::protobuf::Message& message) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream out(&stream);
    out.SetSerializationDeterministic(true);
    message.SerializeToCodedStream(&out);
  }
  return Sha256Hex(bytes);
}

absl::Status CheckRequestId(const std::string& request_id) {
  if (!request_id.empty() && request_id.size() <= kMaxRequestId) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("request_id must have 1 to ", kMaxRequestId, " characters, it has ", request_id.size()));
}

bool Matches(const v1::ListJobsRequest& request, const v1::Job& job) {
  const auto& states = request.states();
  if (!states.empty() && std::find(states.begin(), states.end(), job.status().state()) == states.end()) return false;
  return std::all_of(request.labels().begin(), request.labels().end(), [&](const auto& label) {
    const auto it = job.spec().labels().find(label.first);
    return it != job.spec().labels().end() && it->second == label.second;
  });
}

// A job's rows with seq, batch by batch, to its end.
template <typename Request, typename Row>
Feed<Row>* FeedOfRows(JobController* controller, const Request& request,
                      absl::StatusOr<std::vector<Row>> (JobStore::*list)(const std::string& job_id, int64_t after_seq, int limit)) {
  return new Feed<Row>(
      controller, request.job_id(),
      [controller, list, seen = request.after_seq(), follow = request.follow()](const v1::Job& job, std::deque<Row>* out) mutable -> absl::StatusOr<bool> {
        PPFT_ASSIGN_OR_RETURN(std::vector<Row> rows, (controller->store().*list)(job.id(), seen, kFeedBatch));
        for (Row& row : rows) {
          seen = row.seq();
          out->push_back(std::move(row));
        }
        return !follow || IsTerminal(job.status().state());
      });
}

}  // namespace

absl::StatusOr<std::vector<v1::Violation>> JobServiceImpl::Check(const v1::JobSpec& spec, bool uploaded) {
  PPFT_ASSIGN_OR_RETURN(const SpecFacts facts, controller_->Run([&spec](JobStore& store) { return GatherFacts(store, spec); }));
  return CheckSpec(spec, facts, uploaded, check_adapter_, check_model_files_);
}

grpc::ServerUnaryReactor* JobServiceImpl::ValidateJob(grpc::CallbackServerContext* context, const v1::ValidateJobRequest* request,
                                                      v1::ValidateJobResponse* response) {
  return AnswerFromPool(context, controller_, [this, request, response]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const std::vector<v1::Violation> violations, Check(request->spec(), /*uploaded=*/false));
    for (const v1::Violation& violation : violations) *response->add_violations() = violation;
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::PlanJob(grpc::CallbackServerContext* context, const v1::PlanJobRequest* request, v1::PlanJobResponse* response) {
  return AnswerFromPool(context, controller_, [this, request, response]() -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const std::vector<v1::Violation> violations, Check(request->spec(), /*uploaded=*/false));
    for (const v1::Violation& violation : violations) *response->add_violations() = violation;
    if (!violations.empty()) {
      response->set_reason("the job file has errors");
      return absl::OkStatus();
    }
    struct Ground {
      v1::ModelRecord model;
      std::vector<OfferedDevice> devices;
      bool gpus_away;
    };
    PPFT_ASSIGN_OR_RETURN(const Ground ground, controller_->Run([this, request](JobStore&) -> absl::StatusOr<Ground> {
      PPFT_ASSIGN_OR_RETURN(const v1::ModelRecord* model, controller_->Model(request->spec().model().base_model()));
      return Ground{*model, controller_->AllDevices(), !controller_->GpusAway().empty()};
    }));
    v1::JobRecord record;
    *record.mutable_job()->mutable_spec() = request->spec();
    PPFT_ASSIGN_OR_RETURN(PlanDraft draft, JobPlanner().Draft(record, ground.model, ground.devices, ground.gpus_away, request->supervised_ratio()));
    *response->mutable_plan() = std::move(draft.plan);
    response->set_fits(draft.fit.ok());
    response->set_reason(draft.fit.ok() ? "" : std::string(draft.fit.message()));
    response->set_devices_needed(draft.devices_needed);
    response->set_devices_present(draft.devices_present);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::SubmitJob(grpc::CallbackServerContext* context, const v1::SubmitJobRequest* request, v1::Job* response) {
  return AnswerFromPool(context, controller_, [this, request, response]() -> absl::Status {
    PPFT_RETURN_IF_ERROR(CheckRequestId(request->request_id()));
    const std::string payload = PayloadSha256(request->spec());
    // A repeated request gets its first answer even if what it names has changed since.
    PPFT_ASSIGN_OR_RETURN(const std::optional<std::string> first,
                          controller_->Run([&](JobStore& store) { return store.FindRequest("SubmitJob", request->request_id(), payload); }));
    v1::JobSpec spec = request->spec();
    spec::FillNewerFields(&spec);  // whoever sent it may be older than they are
    if (!first.has_value()) {
      PPFT_ASSIGN_OR_RETURN(const std::vector<v1::Violation> violations, Check(spec, /*uploaded=*/true));
      PPFT_RETURN_IF_ERROR(ViolationsStatus(violations));
    }
    PPFT_ASSIGN_OR_RETURN(*response, controller_->Run([&](JobStore&) { return controller_->Submit(spec, request->request_id(), payload); }));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::GetJob(grpc::CallbackServerContext* context, const v1::GetJobRequest* request, v1::Job* response) {
  return AnswerAfterCommit(context, controller_, [this, request, response](JobStore&) -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const v1::Job* job, controller_->FindJob(request->id()));
    *response = *job;
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::ListJobs(grpc::CallbackServerContext* context, const v1::ListJobsRequest* request, v1::ListJobsResponse* response) {
  return AnswerAfterCommit(context, controller_, [this, request, response](JobStore&) -> absl::Status {
    if (request->page_size() < 0 || request->page_size() > kMaxPageSize) {
      return absl::InvalidArgumentError(absl::StrCat("page_size must be 0 to ", kMaxPageSize, ", it is ", request->page_size()));
    }
    int64_t before = INT64_MAX;
    if (!request->page_token().empty() && !absl::SimpleAtoi(request->page_token(), &before)) {
      return absl::InvalidArgumentError("page_token is not one that ListJobs gave");
    }
    const int page_size = request->page_size() == 0 ? kDefaultPageSize : request->page_size();
    size_t bytes = 0;
    int64_t last = 0;
    for (const v1::JobRecord* record : controller_->NewestJobs()) {
      if (record->submit_order() >= before || !Matches(*request, record->job())) continue;
      bytes += record->job().ByteSizeLong();
      if (response->jobs_size() > 0 && (response->jobs_size() == page_size || bytes > kMaxPageBytes)) {
        response->set_next_page_token(absl::StrCat(last));
        break;
      }
      *response->add_jobs() = record->job();
      last = record->submit_order();
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::CancelJob(grpc::CallbackServerContext* context, const v1::CancelJobRequest* request, v1::Job* response) {
  return AnswerAfterCommit(context, controller_, [this, request, response](JobStore&) -> absl::Status {
    if (request->request_id().size() > kMaxRequestId) return CheckRequestId(request->request_id());
    PPFT_ASSIGN_OR_RETURN(*response, controller_->Cancel(request->id(), request->request_id(), Sha256Hex(request->id())));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::GetMetrics(grpc::CallbackServerContext* context, const v1::GetMetricsRequest* request,
                                                     v1::GetMetricsResponse* response) {
  return AnswerAfterCommit(context, controller_, [this, request, response](JobStore& store) -> absl::Status {
    PPFT_ASSIGN_OR_RETURN(const v1::Job* job, controller_->FindJob(request->job_id()));
    PPFT_ASSIGN_OR_RETURN(const std::vector<v1::MetricRow> rows, store.ListMetrics(job->id(), request->after_step(), kMaxMetricRows + 1));
    size_t end = rows.size();
    if (end > kMaxMetricRows) {
      // Whole steps only: the next call goes on after the last one.
      end = kMaxMetricRows;
      while (end > 1 && rows[end - 1].step() == rows[end].step()) --end;
    }
    for (size_t i = 0; i < end; ++i) *response->add_rows() = rows[i];
    return absl::OkStatus();
  });
}

grpc::ServerWriteReactor<v1::WatchJobResponse>* JobServiceImpl::WatchJob(grpc::CallbackServerContext* context, const v1::WatchJobRequest* request) {
  return new Feed<v1::WatchJobResponse>(
      controller_, request->id(), [seen = request->after_seq()](const v1::Job& job, std::deque<v1::WatchJobResponse>* out) mutable -> absl::StatusOr<bool> {
        if (job.seq() > seen) {
          seen = job.seq();
          *out->emplace_back().mutable_job() = job;
        }
        return IsTerminal(job.status().state());
      });
}

grpc::ServerWriteReactor<v1::Event>* JobServiceImpl::StreamEvents(grpc::CallbackServerContext* context, const v1::StreamEventsRequest* request) {
  return FeedOfRows(controller_, *request, &JobStore::ListEvents);
}

grpc::ServerWriteReactor<v1::LogLine>* JobServiceImpl::StreamLogs(grpc::CallbackServerContext* context, const v1::StreamLogsRequest* request) {
  return FeedOfRows(controller_, *request, &JobStore::ListLogs);
}

grpc::ServerWriteReactor<v1::TraceJobResponse>* JobServiceImpl::TraceJob(grpc::CallbackServerContext* context, const v1::TraceJobRequest* request) {
  // Lives as long as the stream: whoever goes away wants no trace any more.
  struct Trace {
    explicit Trace(JobController* job_controller) : controller(job_controller) {}
    ~Trace() {
      if (id != 0) controller->EndTrace(job, id);
    }
    JobController* const controller;
    std::string job;
    int64_t id = 0;
    bool complete = false;
  };
  const int steps = request->num_steps() == 0 ? kDefaultTraceSteps : request->num_steps();
  return new Feed<v1::TraceJobResponse>(
      controller_, request->id(),
      [trace = std::make_shared<Trace>(controller_), steps](const v1::Job& job, std::deque<v1::TraceJobResponse>* out) -> absl::StatusOr<bool> {
        if (trace->complete) return true;
        if (trace->id == 0) {
          trace->job = job.id();
          PPFT_ASSIGN_OR_RETURN(trace->id, trace->controller->BeginTrace(job.id(), steps));
        }
        PPFT_ASSIGN_OR_RETURN(trace->complete, trace->controller->TakeTrace(trace->job, trace->id, out));
        return trace->complete;
      });
}

grpc::ServerUnaryReactor* JobServiceImpl::PauseJob(grpc::CallbackServerContext* context, const v1::PauseJobRequest* request, v1::Job* response) {
  return AnswerNotYet(context, "pausing a job");
}
grpc::ServerUnaryReactor* JobServiceImpl::ResumeJob(grpc::CallbackServerContext* context, const v1::ResumeJobRequest* request, v1::Job* response) {
  return AnswerNotYet(context, "resuming a paused job");
}
grpc::ServerUnaryReactor* JobServiceImpl::UpdateJob(grpc::CallbackServerContext* context, const v1::UpdateJobRequest* request, v1::Job* response) {
  return AnswerNotYet(context, "changing a submitted job");
}
grpc::ServerUnaryReactor* JobServiceImpl::DeleteJob(grpc::CallbackServerContext* context, const v1::DeleteJobRequest* request,
                                                    v1::DeleteJobResponse* response) {
  return AnswerNotYet(context, "deleting a job");
}
grpc::ServerWriteReactor<v1::MetricRow>* JobServiceImpl::StreamMetrics(grpc::CallbackServerContext* context, const v1::StreamMetricsRequest* request) {
  return new Feed<v1::MetricRow>(controller_, request->job_id(), [](const v1::Job&, std::deque<v1::MetricRow>*) -> absl::StatusOr<bool> {
    return absl::UnimplementedError("following metrics is not supported in this version: ask GetMetrics again, or watch the job");
  });
}

}  // namespace ppft::coordinator
