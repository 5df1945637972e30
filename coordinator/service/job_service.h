// JobService over the controller. gRPC's threads only translate and post.
#pragma once

#include "coordinator/job_controller.h"
#include "coordinator/service/job_checks.h"
#include "ppft/v1/job.grpc.pb.h"

namespace ppft::coordinator {

class JobServiceImpl final : public v1::JobService::CallbackService {
 public:
  JobServiceImpl(JobController* controller, AdapterCheck check_adapter, ModelFilesCheck check_model_files)
      : controller_(controller), check_adapter_(std::move(check_adapter)), check_model_files_(std::move(check_model_files)) {}

  grpc::ServerUnaryReactor* ValidateJob(grpc::CallbackServerContext* context, const v1::ValidateJobRequest* request,
                                        v1::ValidateJobResponse* response) override;
  grpc::ServerUnaryReactor* PlanJob(grpc::CallbackServerContext* context, const v1::PlanJobRequest* request, v1::PlanJobResponse* response) override;
  grpc::ServerUnaryReactor* SubmitJob(grpc::CallbackServerContext* context, const v1::SubmitJobRequest* request, v1::Job* response) override;
  grpc::ServerUnaryReactor* GetJob(grpc::CallbackServerContext* context, const v1::GetJobRequest* request, v1::Job* response) override;
  grpc::ServerUnaryReactor* ListJobs(grpc::CallbackServerContext* context, const v1::ListJobsRequest* request, v1::ListJobsResponse* response) override;
  grpc::ServerUnaryReactor* CancelJob(grpc::CallbackServerContext* context, const v1::CancelJobRequest* request, v1::Job* response) override;
  grpc::ServerUnaryReactor* GetMetrics(grpc::CallbackServerContext* context, const v1::GetMetricsRequest* request, v1::GetMetricsResponse* response) override;
  grpc::ServerWriteReactor<v1::WatchJobResponse>* WatchJob(grpc::CallbackServerContext* context, const v1::WatchJobRequest* request) override;
  grpc::ServerWriteReactor<v1::Event>* StreamEvents(grpc::CallbackServerContext* context, const v1::StreamEventsRequest* request) override;
  grpc::ServerWriteReactor<v1::LogLine>* StreamLogs(grpc::CallbackServerContext* context, const v1::StreamLogsRequest* request) override;

  grpc::ServerUnaryReactor* PauseJob(grpc::CallbackServerContext* context, const v1::PauseJobRequest* request, v1::Job* response) override;
  grpc::ServerUnaryReactor* ResumeJob(grpc::CallbackServerContext* context, const v1::ResumeJobRequest* request, v1::Job* response) override;
  grpc::ServerUnaryReactor* UpdateJob(grpc::CallbackServerContext* context, const v1::UpdateJobRequest* request, v1::Job* response) override;
  grpc::ServerUnaryReactor* DeleteJob(grpc::CallbackServerContext* context, const v1::DeleteJobRequest* request, v1::DeleteJobResponse* response) override;
  grpc::ServerWriteReactor<v1::TraceJobResponse>* TraceJob(grpc::CallbackServerContext* context, const v1::TraceJobRequest* request) override;
  grpc::ServerWriteReactor<v1::MetricRow>* StreamMetrics(grpc::CallbackServerContext* context, const v1::StreamMetricsRequest* request) override;

 private:
  absl::StatusOr<std::vector<v1::Violation>> Check(const v1::JobSpec& spec, bool uploaded);

  JobController* const controller_;
  const AdapterCheck check_adapter_;
  const ModelFilesCheck check_model_files_;
};

}  // namespace ppft::coordinator
