// python.exe for a folder that holds python311.dll but no interpreter, and for the virtual
// environments made from there. Part of the Windows that scripts/_wine.py puts together.
#include <windows.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

namespace {

std::wstring wide(const std::string& utf8) {
  std::wstring text(utf8.size(), L'\0');
  const int size = static_cast<int>(utf8.size());
  text.resize(static_cast<std::size_t>(
      MultiByteToWideChar(CP_UTF8, 0, utf8.data(), size, text.data(), size)));
  return text;
}

// The folder of the Python that a virtual environment was made from: "home = ..." of pyvenv.cfg.
std::filesystem::path home_of(const std::filesystem::path& environment) {
  std::ifstream settings(environment / "pyvenv.cfg");
  const std::string key = "home = ";
  for (std::string line; std::getline(settings, line);) {
    if (line.rfind(key, 0) == 0) {
      return wide(line.substr(key.size(), line.find_last_not_of('\r') + 1 - key.size()));
    }
  }
  return {};
}

}  // namespace

int wmain(int count, wchar_t** arguments) {
  wchar_t name[32768];
  GetModuleFileNameW(nullptr, name, 32768);
  const std::filesystem::path exe = name;
  std::filesystem::path folder = exe.parent_path();
  if (!std::filesystem::exists(folder / "python311.dll")) {
    folder = home_of(folder.parent_path());
    SetEnvironmentVariableW(L"__PYVENV_LAUNCHER__", name);  // where Python looks for pyvenv.cfg
  }
  const HMODULE library =
      LoadLibraryExW((folder / "python311.dll").c_str(), nullptr, LOAD_WITH_ALTERED_SEARCH_PATH);
  if (library == nullptr) {
    std::fprintf(stderr, "python311.dll: error %u\n", static_cast<unsigned>(GetLastError()));
    return 126;
  }
  using Main = int (*)(int, wchar_t**);
  const auto run = reinterpret_cast<Main>(  // through void*: the types have nothing in common
      reinterpret_cast<void*>(GetProcAddress(library, "Py_Main")));
  return run == nullptr ? 127 : run(count, arguments);
}
