#include "cli/plot/page.h"

#include "fmt/format.h"

#include "cli/plot/plot.h"

namespace tandem::cli {
namespace {

constexpr char kPageStyle[] =
    "body{font:14px sans-serif;margin:24px;color:#222;background:#fff}"
    "h2{font-size:16px;margin:28px 0 8px;border-bottom:1px solid #ccc}"
    ".row{display:flex;flex-wrap:wrap;gap:16px}"
    ".panel{box-sizing:border-box;border:1px solid #ddd;border-radius:4px;padding:8px;width:400px}"
    ".wide{width:816px}.figure{width:192px}.big{font-size:24px}"
    "h3{font-size:13px;margin:0 0 6px}.help,.key{font-size:11px;color:#666}"
    ".key span{margin-right:10px;white-space:nowrap}"
    ".key i{display:inline-block;width:9px;height:9px;margin-right:4px}"
    "svg{width:100%}svg text{font:10px sans-serif;fill:#666}.wide svg "
    "text{font-size:5px}.y{text-anchor:end}"
    ".grid{stroke:#eee;fill:none}.axis{stroke:#999;fill:none}"
    ".line{fill:none;stroke-width:1.5;stroke-linejoin:round;stroke-linecap:round}"
    "table{border-collapse:collapse;font-size:12px}"
    "td,th{padding:2px 10px 2px 0;text-align:left;border-bottom:1px solid #eee}";

}  // namespace

HtmlPage::HtmlPage(const std::string& title, const std::string& subtitle)
    : head_(fmt::format("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>"
                        "<title>{0}</title><style>{1}</style></head>\n<body><h1>{0}</h1><p>{2}</p>",
                        HtmlText(title), kPageStyle, HtmlText(subtitle))) {}

void HtmlPage::Section(const std::string& title) {
  if (!body_.empty()) body_ += "</div>";
  body_ += fmt::format("\n<h2>{}</h2><div class=\"row\">", HtmlText(title));
}

void HtmlPage::Figure(const std::string& title, const std::string& value) {
  body_ += fmt::format("\n<div class=\"panel figure\"><h3>{}</h3><div class=\"big\">{}</div></div>",
                       HtmlText(title), HtmlText(value));
}

void HtmlPage::Plot(const std::string& title, const std::string& plot, const std::string& help,
                    bool wide) {
  body_ += fmt::format("\n<div class=\"panel{}\"><h3>{}</h3>{}", wide ? " wide" : "",
                       HtmlText(title), plot);
  if (!help.empty()) body_ += fmt::format("<div class=\"help\">{}</div>", HtmlText(help));
  body_ += "</div>";
}

void HtmlPage::Table(const std::string& title, const std::vector<std::vector<std::string>>& rows) {
  body_ += fmt::format("\n<div class=\"panel wide\"><h3>{}</h3><table>", HtmlText(title));
  for (size_t i = 0; i < rows.size(); ++i) {
    const char* cell = i == 0 ? "th" : "td";
    body_ += "\n<tr>";
    for (const std::string& text : rows[i]) {
      body_ += fmt::format("<{0}>{1}</{0}>", cell, HtmlText(text));
    }
    body_ += "</tr>";
  }
  body_ += "</table></div>";
}

std::string HtmlPage::Html() const {
  return head_ + body_ + (body_.empty() ? "" : "</div>") + "</body></html>\n";
}

}  // namespace tandem::cli
