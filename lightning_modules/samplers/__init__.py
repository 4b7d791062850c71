"""Ways of sampling that serve several papers: functions of a predictor, noise and chance."""
