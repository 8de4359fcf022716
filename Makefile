# For developers. Users need run_pipeline.sh and run_tests.sh alone.
PYTHON := .venv/bin/python

.PHONY: check lint test fast ui
check: lint test ## what CI runs

lint:
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

test: ## every test, the whole DAG among them
	./run_tests.sh

fast: ## all but the slow tests
	./run_tests.sh -m "not slow and not gpu"

ui: ## MLflow on http://127.0.0.1:5000; select two parent runs and compare
	MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true .venv/bin/mlflow ui --workers 1 --host 127.0.0.1 \
	  --port 5000 --backend-store-uri sqlite:///$(CURDIR)/mlruns/mlflow.db
