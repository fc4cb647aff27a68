// A page of plots, figures and tables in one HTML file that needs nothing beside it: no script, no
// network. It is well-formed XML too. Not thread-safe.
#pragma once

#include <string>
#include <vector>

namespace tandem::cli {

class HtmlPage {
 public:
  // `subtitle` stands below the title: of what, and when.
  HtmlPage(const std::string& title, const std::string& subtitle);

  // The first of these comes before anything else.
  void Section(const std::string& title);
  // A figure in large type.
  void Figure(const std::string& title, const std::string& value);
  // `plot` as plot.h makes it; `help` below it, "" for none. `wide` takes a whole row.
  void Plot(const std::string& title, const std::string& plot, const std::string& help = "",
            bool wide = false);
  // The first row is the heading.
  void Table(const std::string& title, const std::vector<std::vector<std::string>>& rows);

  // The whole page.
  std::string Html() const;

 private:
  std::string head_;
  std::string body_;
};

}  // namespace tandem::cli
