"""Published results, trained again: `locc reproduce`, and the page docs/results.md."""
