#include "tests/support/pty.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cwchar>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <thread>
#include <unistd.h>

#include "tests/support/deadline.h"

namespace tandem {
namespace {

// How many bytes the character that begins with `lead` has.
size_t CharacterBytes(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0xc0 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

int Width(const std::string& character) {
  wchar_t wide = 0;
  std::mbstate_t state{};
  const size_t n = std::mbrtowc(&wide, character.data(), character.size(), &state);
  return n > character.size() ? 1 : wcwidth(wide);
}

int NumberAt(const std::string& parameters, size_t index, int otherwise) {
  size_t begin = 0;
  for (; index > 0; --index) {
    const size_t semicolon = parameters.find(';', begin);
    if (semicolon == std::string::npos) return otherwise;
    begin = semicolon + 1;
  }
  const int number = std::atoi(parameters.c_str() + begin);
  return number > 0 ? number : otherwise;
}

}  // namespace

Screen::Screen(int columns, int rows) : columns_(columns), rows_(rows) {
  std::setlocale(LC_CTYPE, "C.UTF-8");
  grid_.assign(static_cast<size_t>(rows), Blank());
}

Screen::Row Screen::Blank() const {
  return {std::vector<std::string>(static_cast<size_t>(columns_), " "), false};
}

void Screen::Write(const std::string& bytes) {
  pending_ += bytes;
  size_t at = 0;
  while (at < pending_.size()) {
    const char c = pending_[at];
    if (c == '\x1b') {
      if (at + 1 >= pending_.size()) break;
      if (pending_[at + 1] != '[') {
        // ESC = and the like: modes of the keypad and character sets, one byte or two.
        at += pending_[at + 1] == '(' || pending_[at + 1] == ')' ? 3 : 2;
        continue;
      }
      size_t end = at + 2;
      while (end < pending_.size() && (pending_[end] < '@' || pending_[end] > '~')) ++end;
      if (end >= pending_.size()) break;
      Csi(pending_.substr(at + 2, end - at - 2), pending_[end]);
      at = end + 1;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      Control(c);
      ++at;
    } else {
      const size_t n = CharacterBytes(c);
      if (at + n > pending_.size()) break;
      Put(pending_.substr(at, n));
      at += n;
    }
  }
  pending_.erase(0, at);
}

void Screen::Control(char c) {
  switch (c) {
    case '\r':
      column_ = 0;
      break;
    case '\n':
      NewLine();
      break;
    case '\b':
      column_ = std::max(0, column_ - 1);
      break;
    case '\t':
      column_ = std::min(columns_ - 1, (column_ / 8 + 1) * 8);
      break;
    case '\a':
      return;
    default:
      unknown_.push_back("control " + std::to_string(c));
  }
  wrap_next_ = false;
}

void Screen::NewLine() {
  if (++row_ < rows_) return;
  row_ = rows_ - 1;
  scrolled_.push_back(std::move(grid_.front()));
  grid_.erase(grid_.begin());
  grid_.push_back(Blank());
}

void Screen::Put(const std::string& character) {
  const int width = Width(character);
  if (width == 0) {  // joins the one before
    if (column_ > 0)
      grid_[static_cast<size_t>(row_)].cells[static_cast<size_t>(column_ - 1)] += character;
    return;
  }
  if (wrap_next_ || column_ + width > columns_) {
    grid_[static_cast<size_t>(row_)].wraps = true;
    column_ = 0;
    NewLine();
    wrap_next_ = false;
  }
  std::vector<std::string>& cells = grid_[static_cast<size_t>(row_)].cells;
  cells[static_cast<size_t>(column_)] = character;
  if (width == 2) cells[static_cast<size_t>(column_) + 1] = "";
  column_ += width;
  if (column_ < columns_) return;
  column_ = columns_ - 1;
  wrap_next_ = true;
}

void Screen::Erase(int row, int from, int to) {
  Row& line = grid_[static_cast<size_t>(row)];
  for (int i = from; i < to; ++i) line.cells[static_cast<size_t>(i)] = " ";
  if (to == columns_) line.wraps = false;
}

void Screen::Csi(const std::string& parameters, char final) {
  const int n = NumberAt(parameters, 0, 1);
  const bool plain = parameters.find_first_not_of("0123456789;") == std::string::npos;
  if (final == 'm') return;
  if (!plain) {
    if (parameters == "?2004") bracketed_paste_ = final == 'h';
    if (parameters.front() != '?' && parameters.front() != '>')
      unknown_.push_back(parameters + final);
    return;
  }
  wrap_next_ = false;
  std::vector<std::string>& cells = grid_[static_cast<size_t>(row_)].cells;
  switch (final) {
    case 'A':
      row_ = std::max(0, row_ - n);
      break;
    case 'B':
      row_ = std::min(rows_ - 1, row_ + n);
      break;
    case 'C':
      column_ = std::min(columns_ - 1, column_ + n);
      break;
    case 'D':
      column_ = std::max(0, column_ - n);
      break;
    case 'G':
      column_ = std::min(columns_, n) - 1;
      break;
    case 'H':
      row_ = std::min(rows_, n) - 1;
      column_ = std::min(columns_, NumberAt(parameters, 1, 1)) - 1;
      break;
    case 'J': {
      const int mode = NumberAt(parameters, 0, 0);
      if (mode == 0) Erase(row_, column_, columns_);
      for (int row = mode == 0 ? row_ + 1 : 0; row < rows_; ++row) Erase(row, 0, columns_);
      break;
    }
    case 'K': {
      const int mode = NumberAt(parameters, 0, 0);
      Erase(row_, mode == 0 ? column_ : 0, mode == 1 ? column_ + 1 : columns_);
      break;
    }
    case 'P':
      for (int i = 0; i < n && column_ < columns_; ++i) {
        cells.erase(cells.begin() + column_);
        cells.push_back(" ");
      }
      break;
    case '@':
      for (int i = 0; i < n && column_ < columns_; ++i) {
        cells.insert(cells.begin() + column_, " ");
        cells.pop_back();
      }
      break;
    case 'X':
      Erase(row_, column_, std::min(columns_, column_ + n));
      break;
    default:
      unknown_.push_back(parameters + final);
  }
}

std::string Screen::Join(const Row& row) const {
  std::string out;
  for (const std::string& cell : row.cells) out += cell;
  if (row.wraps) return out;
  const size_t last = out.find_last_not_of(' ');
  return out.substr(0, last == std::string::npos ? 0 : last + 1);
}

std::string Screen::Line(int row) const {
  Row line = grid_[static_cast<size_t>(row)];
  line.wraps = false;
  return Join(line);
}

std::string Screen::Text() const {
  std::string out;
  for (const auto* rows : {&scrolled_, &grid_}) {
    for (const Row& row : *rows) {
      out += Join(row);
      if (!row.wraps) out += '\n';
    }
  }
  const size_t last = out.find_last_not_of('\n');
  return out.substr(0, last == std::string::npos ? 0 : last + 1);
}

PtyProcess::PtyProcess(const std::vector<std::string>& args, const std::vector<std::string>& env,
                       int columns, int rows)
    : screen_(columns, rows) {
  std::vector<std::string> arg_copy = args, env_copy;
  for (char** e = environ; *e != nullptr; ++e) env_copy.push_back(*e);
  env_copy.push_back("TERM=xterm-256color");
  env_copy.insert(env_copy.end(), env.begin(), env.end());
  const auto pointers = [](std::vector<std::string>& strings) {
    std::vector<char*> out;
    for (std::string& s : strings) out.push_back(s.data());
    out.push_back(nullptr);
    return out;
  };
  const std::vector<char*> argv = pointers(arg_copy);
  std::vector<char*> envp;
  // The last of a name counts; execvpe would take the first.
  for (size_t i = 0; i < env_copy.size(); ++i) {
    const std::string name = env_copy[i].substr(0, env_copy[i].find('=') + 1);
    const bool again = std::any_of(env_copy.begin() + static_cast<ptrdiff_t>(i) + 1, env_copy.end(),
                                   [&](const std::string& e) { return e.starts_with(name); });
    if (!again) envp.push_back(env_copy[i].data());
  }
  envp.push_back(nullptr);
  winsize size{};
  size.ws_col = static_cast<unsigned short>(columns);
  size.ws_row = static_cast<unsigned short>(rows);
  pid_ = forkpty(&master_, nullptr, nullptr, &size);
  if (pid_ < 0) std::abort();
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    execvpe(argv[0], argv.data(), envp.data());
    std::fprintf(stderr, "cannot run %s: %s\n", argv[0], std::strerror(errno));
    _exit(127);
  }
  fcntl(master_, F_SETFD, FD_CLOEXEC);
  fcntl(master_, F_SETFL, O_NONBLOCK);
}

PtyProcess::~PtyProcess() {
  if (!exit_code_.has_value()) {
    kill(pid_, SIGKILL);
    Wait(30);
  }
  close(master_);
}

bool PtyProcess::Read(double seconds) {
  pollfd fd{master_, POLLIN, 0};
  if (poll(&fd, 1, static_cast<int>(std::max(0.0, seconds) * 1000)) <= 0) return false;
  char chunk[65536];
  const ssize_t n = read(master_, chunk, sizeof(chunk));
  if (n <= 0) return false;  // EIO: the program has ended
  screen_.Write(std::string(chunk, static_cast<size_t>(n)));
  return true;
}

void PtyProcess::Type(const std::string& keys) {
  const auto end = After(60);
  for (size_t done = 0; done < keys.size() && SecondsUntil(end) > 0;) {
    const ssize_t n = write(master_, keys.data() + done, keys.size() - done);
    if (n > 0) {
      done += static_cast<size_t>(n);
    } else if (errno != EAGAIN) {
      return;
    }
    Read(n > 0 ? 0 : 0.01);
  }
}

bool PtyProcess::WaitUntil(const std::function<bool(const Screen&)>& condition, double seconds) {
  const auto end = After(seconds);
  while (!condition(screen_)) {
    if (SecondsUntil(end) <= 0) return false;
    if (Read(std::min(0.1, SecondsUntil(end)))) continue;
    if (Wait(0).has_value() && !Read(0)) return condition(screen_);
  }
  return true;
}

bool PtyProcess::WaitFor(const std::string& text, double seconds) {
  return WaitFor(text, 1, seconds);
}

bool PtyProcess::WaitFor(const std::string& text, int count, double seconds) {
  return WaitUntil(
      [&](const Screen& screen) {
        const std::string all = screen.Text();
        int found = 0;
        for (size_t at = all.find(text); at != std::string::npos; at = all.find(text, at + 1))
          ++found;
        return found >= count;
      },
      seconds);
}

std::optional<int> PtyProcess::Wait(double seconds) {
  const auto end = After(seconds);
  while (!exit_code_.has_value()) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      while (Read(0)) {
      }
    } else if (SecondsUntil(end) <= 0) {
      return std::nullopt;
    } else if (!Read(0.005)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  return exit_code_;
}

void PtyProcess::Signal(int signal) {
  if (!exit_code_.has_value()) kill(pid_, signal);
}

bool PtyProcess::IsCooked() const {
  termios modes{};
  return tcgetattr(master_, &modes) == 0 && (modes.c_lflag & ICANON) != 0 &&
         (modes.c_lflag & ECHO) != 0;
}

}  // namespace tandem
