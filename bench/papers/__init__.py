"""The papers' experiments: ``python -m bench.papers.NAME --data FOLDER``; see README.md."""
