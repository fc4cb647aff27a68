#include "cli/line_editor.h"

#include <cerrno>
#include <clocale>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cwchar>
#include <deque>
#include <histedit.h>
#include <langinfo.h>
#include <poll.h>
#include <string>
#include <string_view>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include "common/text/utf8.h"

namespace tandem::cli {
namespace {

// A terminal that knows bracketed paste puts pasted text between these two, once asked to.
constexpr char kAskForBrackets[] = "\x1b[?2004h";
constexpr char kNoMoreBrackets[] = "\x1b[?2004l";
constexpr wchar_t kPasteBegins[] = L"\x1b[200~";
constexpr std::wstring_view kPasteEnds = L"\x1b[201~";
constexpr wchar_t kInterruptKey = L'\x03';
constexpr int kHistoryLines = 1000;

// Not through stdio, whose lock another thread may hold.
void WriteToTerminal(std::string_view text) {
  [[maybe_unused]] const ssize_t n = write(STDOUT_FILENO, text.data(), text.size());
}

// wchar_t is a code point here.
std::wstring ToWide(const std::string& text) {
  std::wstring out;
  for (size_t at = 0; at < text.size();) out += static_cast<wchar_t>(NextCodePoint(text, &at));
  return out;
}

std::string ToUtf8(std::wstring_view text) {
  std::string out;
  for (const wchar_t c : text) AppendCodePoint(static_cast<uint32_t>(c), &out);
  return out;
}

// Pasted text as a message has it: terminals send the Enter key for its newlines. Other control
// characters have no place in it.
std::wstring CleanPaste(std::wstring_view text) {
  std::wstring out;
  for (size_t i = 0; i < text.size(); ++i) {
    const wchar_t c = text[i];
    if (c == L'\r') {
      out += L'\n';
      if (i + 1 < text.size() && text[i + 1] == L'\n') ++i;
    } else if (c >= L' ' ? c != L'\x7f' : c == L'\n' || c == L'\t') {
      out += c;
    }
  }
  return out;
}

}  // namespace

struct LineEditor::Impl {
  termios saved{};
  int interrupt_fd = -1;
  EditLine* edit = nullptr;
  HistoryW* history = nullptr;
  std::wstring prompt;
  std::string bytes;               // read, not decoded yet
  std::deque<wchar_t> characters;  // decoded, not taken yet
  bool interrupted = false;
  winsize size{};

  void BindKeys();
  void NoteSize();
  // Takes the next character, after waiting for it; false at the end of input.
  bool Next(wchar_t* out);
  // Reads what there is, at least something.
  bool Fill();

  static Impl* Of(EditLine* edit) {
    void* self = nullptr;
    el_wget(edit, EL_CLIENTDATA, &self);
    return static_cast<Impl*>(self);
  }
  static wchar_t* Prompt(EditLine* edit) { return Of(edit)->prompt.data(); }
  static int NextCharacter(EditLine* edit, wchar_t* out) { return Of(edit)->Next(out) ? 1 : 0; }
  static unsigned char OnInterrupt(EditLine* edit, wint_t);
  static unsigned char OnPaste(EditLine* edit, wint_t);
  static unsigned char OnNewLine(EditLine* edit, wint_t);
};

// Shows ^C behind all that was typed, and has libedit end the line in its own way.
unsigned char LineEditor::Impl::OnInterrupt(EditLine* edit, wint_t) {
  Impl* const self = Of(edit);
  self->interrupted = true;
  el_cursor(edit, static_cast<int>(el_wline(edit)->lastchar - el_wline(edit)->cursor));
  el_winsertstr(edit, L"^C");
  self->characters.assign(1, L'\r');
  return CC_REFRESH;
}

unsigned char LineEditor::Impl::OnPaste(EditLine* edit, wint_t) {
  Impl* const self = Of(edit);
  std::wstring text;
  wchar_t c = 0;
  while (!text.ends_with(kPasteEnds) && self->Next(&c)) {
    if (c == kInterruptKey) {  // the end of the paste may never come
      self->characters.push_front(c);
      return CC_REFRESH;
    }
    text += c;
  }
  if (text.ends_with(kPasteEnds)) text.resize(text.size() - kPasteEnds.size());
  return el_winsertstr(edit, CleanPaste(text).c_str()) == 0 ? CC_REFRESH : CC_ERROR;
}

unsigned char LineEditor::Impl::OnNewLine(EditLine* edit, wint_t) {
  return el_winsertstr(edit, L"\n") == 0 ? CC_REFRESH : CC_ERROR;
}

bool LineEditor::Impl::Next(wchar_t* out) {
  while (characters.empty()) {
    if (!Fill()) return false;
  }
  *out = characters.front();
  characters.pop_front();
  return true;
}

bool LineEditor::Impl::Fill() {
  NoteSize();
  pollfd fds[] = {{interrupt_fd, POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}};
  while (poll(fds, 2, -1) < 0) {
    if (errno != EINTR) return false;
  }
  uint64_t count = 0;
  if (fds[0].revents != 0 && read(interrupt_fd, &count, sizeof(count)) > 0) {
    characters.assign(1, kInterruptKey);
    return true;
  }
  char chunk[4096];
  const ssize_t n = read(STDIN_FILENO, chunk, sizeof(chunk));
  if (n <= 0) return false;
  bytes.append(chunk, static_cast<size_t>(n));
  std::string text;
  bytes.erase(0, AppendLossyUtf8(bytes, /*final=*/false, &text));
  for (const wchar_t c : ToWide(text)) characters.push_back(c);
  return true;
}

// libedit asks for the size of the terminal at its start only.
void LineEditor::Impl::NoteSize() {
  winsize now{};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &now) != 0) return;
  if (now.ws_col != size.ws_col || now.ws_row != size.ws_row) el_resize(edit);
  size = now;
}

void LineEditor::Impl::BindKeys() {
  const auto bind = [this](const wchar_t* key, const wchar_t* command) {
    el_wset(edit, EL_BIND, key, command, nullptr);
  };
  el_wset(edit, EL_ADDFN, L"tandem-interrupt", L"Leave the line", OnInterrupt);
  el_wset(edit, EL_ADDFN, L"tandem-paste", L"Take pasted text as it is", OnPaste);
  el_wset(edit, EL_ADDFN, L"tandem-newline", L"Begin another line", OnNewLine);
  bind(L"^C", L"tandem-interrupt");
  bind(kPasteBegins, L"tandem-paste");
  bind(L"\x1b\r", L"tandem-newline");  // Alt-Enter
  bind(L"\x1b\n", L"tandem-newline");
  bind(L"^R", L"em-inc-search-prev");
  bind(L"\x1b[H", L"ed-move-to-beg");
  bind(L"\x1b[1~", L"ed-move-to-beg");
  bind(L"\x1b[F", L"ed-move-to-end");
  bind(L"\x1b[4~", L"ed-move-to-end");
  bind(L"\x1b[3~", L"ed-delete-next-char");
  bind(L"\x1b[1;5C", L"em-next-word");
  bind(L"\x1b[1;5D", L"ed-prev-word");
}

LineEditor::LineEditor() : impl_(std::make_unique<Impl>()) {
  Impl& self = *impl_;
  // libedit writes characters as the locale says, and takes their widths from it.
  std::setlocale(LC_CTYPE, "");
  if (std::strcmp(nl_langinfo(CODESET), "UTF-8") != 0) std::setlocale(LC_CTYPE, "C.UTF-8");
  self.interrupt_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  tcgetattr(STDIN_FILENO, &self.saved);
  termios quiet = self.saved;
  quiet.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
  quiet.c_cc[VMIN] = 1;
  quiet.c_cc[VTIME] = 0;
  tcsetattr(STDIN_FILENO, TCSADRAIN, &quiet);
  ioctl(STDOUT_FILENO, TIOCGWINSZ, &self.size);
  self.edit = el_init("tandem", stdin, stdout, stderr);
  self.history = history_winit();
  HistEventW event;
  history_w(self.history, &event, H_SETSIZE, kHistoryLines);
  history_w(self.history, &event, H_SETUNIQUE, 1);
  el_wset(self.edit, EL_CLIENTDATA, &self);
  el_wset(self.edit, EL_PROMPT, Impl::Prompt);
  el_wset(self.edit, EL_EDITOR, L"emacs");
  el_wset(self.edit, EL_HIST, history_w, self.history);
  el_wset(self.edit, EL_GETCFN, Impl::NextCharacter);
  // Between two reads too ("execute mode"), where libedit would have a terminal as shells leave it.
  el_wset(self.edit, EL_SETTY, L"-x", L"-echo", L"-icanon", nullptr);
  self.BindKeys();
}

LineEditor::~LineEditor() {
  history_wend(impl_->history);
  el_end(impl_->edit);
  tcsetattr(STDIN_FILENO, TCSADRAIN, &impl_->saved);
  close(impl_->interrupt_fd);
}

LineEditor::Line LineEditor::Read(std::string_view prompt) {
  Impl& self = *impl_;
  self.prompt.assign(prompt.begin(), prompt.end());
  self.interrupted = false;
  // A signal that came while no line was read has had its answer.
  uint64_t ignored = 0;
  [[maybe_unused]] const ssize_t n = read(self.interrupt_fd, &ignored, sizeof(ignored));
  std::fflush(stdout);
  WriteToTerminal(kAskForBrackets);
  int count = 0;
  const wchar_t* const typed = el_wgets(self.edit, &count);
  WriteToTerminal(kNoMoreBrackets);
  if (typed == nullptr || count <= 0) return {Outcome::kEndOfInput, ""};
  std::wstring_view text(typed, static_cast<size_t>(count));
  if (text.ends_with(L'\n')) text.remove_suffix(1);
  if (!self.interrupted) return {Outcome::kLine, ToUtf8(text)};
  text.remove_suffix(2);  // ^C
  return {Outcome::kInterrupted, ToUtf8(text)};
}

void LineEditor::AddHistory(const std::string& text) {
  HistEventW event;
  history_w(impl_->history, &event, H_ENTER, ToWide(text).c_str());
}

void LineEditor::Interrupt() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(impl_->interrupt_fd, &one, sizeof(one));
}

void LineEditor::GiveTerminalBack() {
  WriteToTerminal(kNoMoreBrackets);
  tcsetattr(STDIN_FILENO, TCSANOW, &impl_->saved);
}

}  // namespace tandem::cli
