// A job.yaml on its way to the coordinator: read, checked with everything that this machine knows, its files uploaded and replaced by ids.
#pragma once

#include <string>
#include <vector>

#include "clients/ppctl/commands.h"
#include "common/data/rows.h"
#include "common/spec/spec.h"

namespace ppft::ctl {

class JobFile {
 public:
  // Reads and parses; checks the local dataset files (row by row) and the local adapter folder. Complaints are kept for Check or Report. INVALID_ARGUMENT: no
  // such file.
  static absl::StatusOr<JobFile> Load(Context& context, const std::string& file, const std::vector<std::string>& overrides);
  // The same for a text that stands for a file.
  static absl::StatusOr<JobFile> FromText(Context& context, const std::string& name, const std::string& text, const std::string& base_folder,
                                          const std::vector<std::string>& overrides);

  const v1::JobSpec& spec() const { return parsed_.spec; }
  v1::JobSpec* mutable_spec() { return &parsed_.spec; }
  // Share of the training text that is learned, by its bytes; 0 if a dataset is not on this machine.
  double supervised_ratio() const;

  // All that can be said before anything is stored: Resolve, then the coordinator's checks of what is not wrong already. Prints warnings and complaints at
  // their places. INVALID_ARGUMENT if there are complaints, even if the coordinator did not answer.
  absl::Status Check(Context& context);
  // Registers a base_model that is a path under the coordinator's model roots and puts its name into the spec; asks the model for what the file
  // leaves open (the longest sequence). With complaints nothing is registered. A refused path is a complaint.
  absl::Status Resolve(Context& context);
  // The coordinator's checks of the spec as it is now; Report of what they find.
  absl::Status ValidateOnServer(Context& context);
  // Prints the complaints, by place; INVALID_ARGUMENT if there are any.
  absl::Status Report(Context& context) const;
  // The same after adding these.
  absl::Status Report(Context& context, const google::protobuf::RepeatedPtrField<v1::Violation>& violations);
  // Uploads what is local and puts the ids into the spec.
  absl::Status Upload(Context& context);

 private:
  struct LocalFile {
    v1::DatasetSpec* dataset;
    std::string field;
    std::string path;  // on this machine
  };

  void FindLocalFiles(google::protobuf::RepeatedPtrField<v1::DatasetSpec>* datasets, const std::string& field, const std::string& base_folder);
  struct Complaint {
    spec::FieldError place;
    std::string text;  // as it is printed
  };

  void CheckLocalFiles();
  void CheckLocalFile(const LocalFile& local);
  void Count(const LocalFile& local, const data::RowTotals& totals);
  void CheckAdapterFolder(const std::string& base_folder);
  absl::Status NameBaseModel(Context& context);
  // Adds the coordinator's complaints.
  absl::Status Ask(Context& context);
  void Complain(const spec::FieldError& error) { complaints_.push_back({error, spec::ToString(error)}); }
  spec::FieldError At(const std::string& field, const std::string& message) const;

  spec::ParseResult parsed_;
  std::vector<Complaint> complaints_;
  std::vector<LocalFile> local_files_;
  int64_t text_bytes_ = 0;  // of the training rows that are on this machine
  int64_t answer_bytes_ = 0;
  bool all_rows_seen_ = true;
  std::string adapter_folder_;  // "" = none
  bool adapter_is_wrong_ = false;
  bool base_is_unnamed_ = false;  // base_model is a path that no registered model has
  std::string subject_;           // what is wrong, in the closing line: the file's name
};

// Uploads a dataset file and makes a dataset of it.
absl::StatusOr<v1::Dataset> UploadDataset(Context& context, const std::string& path);
// "; did you mean FOLDER/FILE?" for a path at which there is nothing, if a file beside it has nearly that name; else "".
std::string NearFile(const std::string& path);
// "ds-" and 16 hex digits.
bool IsDatasetId(const std::string& text);

}  // namespace ppft::ctl
