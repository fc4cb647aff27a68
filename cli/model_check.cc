#include "cli/model_check.h"

#include <memory>
#include <string_view>

#include "common/base/checkpoint_files.h"
#include "common/base/checkpoint_quantisation.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/text/chat_template.h"
#include "common/text/generation_config.h"
#include "common/text/tokenizer.h"

namespace tandem::cli {
namespace {

// A quantised layer's values lie in words of several; its scales, zero points and groups are no
// parameters of the model.
int64_t ParametersOf(std::string_view name, const SafetensorsEntry& tensor) {
  if (name.ends_with(".qweight")) return tensor.Count() * 32 / CheckpointQuantisation::kBits;
  if (name.ends_with(".qzeros") || name.ends_with(".scales") || name.ends_with(".g_idx")) return 0;
  return tensor.Count();
}

absl::Status CheckWeights(const std::string& model_dir, CheckedModel* model) {
  TANDEM_ASSIGN_OR_RETURN(const CheckpointFiles checkpoint, CheckpointFiles::Read(model_dir));
  int64_t parameters = 0;
  for (const CheckpointFile& file : checkpoint.files) {
    ++model->weight_files;
    model->checkpoint_bytes += static_cast<int64_t>(file.bytes);
    for (const auto& [name, tensor] : file.index) parameters += ParametersOf(name, tensor);
  }
  const int64_t described = model->config.NumParameters();
  if (parameters >= described) return absl::OkStatus();
  return InvalidArgument(
      "{}: the weight files hold {} parameters, config.json describes {}: tensors are missing",
      model_dir, parameters, described);
}

absl::Status CheckText(const std::string& model_dir, CheckedModel* model) {
  TANDEM_RETURN_IF_ERROR(LoadGenerationConfig(model_dir).status());
  const std::string path = model_dir + "/tokenizer.json";
  model->has_tokenizer = FileExists(path);
  if (!model->has_tokenizer) {
    model->warnings.emplace_back(
        "there is no tokenizer.json: prompts and answers are token ids only");
    return absl::OkStatus();
  }
  TANDEM_ASSIGN_OR_RETURN(const std::shared_ptr<const Tokenizer> tokenizer, Tokenizer::Load(path));
  if (tokenizer->vocab_size() > model->config.vocab_size) {
    return InvalidArgument("{}: has ids up to {}, the model's vocab_size (config.json) is {}", path,
                           tokenizer->vocab_size() - 1, model->config.vocab_size);
  }
  TANDEM_ASSIGN_OR_RETURN(const ChatTemplate chat_template, ChatTemplate::Load(model_dir));
  model->has_chat_template = chat_template.has_template();
  if (!model->has_chat_template) {
    model->warnings.emplace_back("there is no chat template: `tandem chat` is refused");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CheckedModel> CheckModel(const std::string& model_dir, bool dummy) {
  CheckedModel model;
  TANDEM_ASSIGN_OR_RETURN(model.config, ModelConfig::Load(model_dir));
  if (!dummy) TANDEM_RETURN_IF_ERROR(CheckWeights(model_dir, &model));
  if (!dummy && model.config.quantisation.has_value()) {
    model.warnings.push_back(
        fmt::format("the weights ({}) are dequantised when they are loaded on a CPU, and take the "
                    "memory of a checkpoint that is not quantised there",
                    model.config.quantisation->Describe()));
  }
  TANDEM_RETURN_IF_ERROR(CheckText(model_dir, &model));
  return model;
}

}  // namespace tandem::cli
