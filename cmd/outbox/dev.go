package main

type devCmd struct{}

func (c *devCmd) Run() error { return nil }
