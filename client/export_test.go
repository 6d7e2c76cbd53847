package client

// MaxChecks is how many check-back questions are worked on at a time.
const MaxChecks = maxChecks
