"""From a loss to a fast, clean graph of its product. It knows no model and no estimator; README.md has the stages."""
