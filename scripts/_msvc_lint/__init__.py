"""What scripts/msvc_lint.py is made of: tokens, sources, rules, and the two ways to ask clang."""
